"""`vit check`: silent on a sound dataset, and a named file for every fault."""

import hashlib
import json
import os
import shutil
import tarfile
from dataclasses import replace

import pytest

from pipeline.errors import InputError
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index, write_index
from pipeline.shards.table import NO_LABEL, read_table, write_table
from tests.pipeline.pictures import small_dataset


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_dataset(tmp_path_factory.mktemp("sound")).directory


@pytest.fixture
def dataset(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "dataset")


@pytest.mark.parametrize("full", [False, True])
def test_a_sound_dataset_has_no_faults(dataset, full):
    assert check_dataset(dataset, full) == []


def test_no_such_path_is_an_input_error_and_no_index_is_a_fault(tmp_path):
    with pytest.raises(InputError, match="no such path"):
        check_dataset(tmp_path / "nowhere", full=False)
    assert "index.json: missing" in check_dataset(tmp_path, full=False)[0]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("damage", ["cut tar", "missing tar", "missing table", "cut table", "table of another shard"])
def test_a_damaged_file_is_named(dataset, damage, full):
    index = read_index(dataset)
    shard, other = index.shards("train")[:2]
    tar, table = index.shard_path(shard), index.table_path(shard)
    match damage:
        case "cut tar":
            os.truncate(tar, shard.bytes // 1024 * 512)
        case "missing tar":
            tar.unlink()
        case "missing table":
            table.unlink()
        case "cut table":
            os.truncate(table, table.stat().st_size - 1)
        case "table of another shard":
            shutil.copy(index.table_path(other), table)
    faults = check_dataset(dataset, full)
    assert len(faults) == 1 and str(table if "table" in damage else tar) in faults[0]


@pytest.mark.parametrize("full", [False, True])
def test_a_tar_cut_at_any_block_is_found(dataset, full):
    index = read_index(dataset)
    shard = min(index.shards("train"), key=lambda shard: shard.bytes)
    path, content = index.shard_path(shard), index.shard_path(shard).read_bytes()
    for size in range(0, len(content), tarfile.BLOCKSIZE):
        path.write_bytes(content[:size])
        assert any(str(path) in fault for fault in check_dataset(dataset, full)), size


def _of_same_size(path, content):
    """(name, offset of the header, blocks of header and content) of two members whose contents have one size."""
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith(".json")]
    sizes = {}
    for member in members:
        if (other := sizes.setdefault(member.size, member)) is not member:
            return other, member
    raise AssertionError("no two members of one size")


@pytest.mark.parametrize("whole", [True, False])
def test_swapped_members_are_found(dataset, whole):
    """With their headers, or their contents alone."""
    index = read_index(dataset)
    for shard in index.shards("train"):
        path = index.shard_path(shard)
        content = bytearray(path.read_bytes())
        one, other = _of_same_size(path, content)
        length = tarfile.BLOCKSIZE * (1 + -(-one.size // tarfile.BLOCKSIZE)) if whole else one.size
        starts = (one.offset, other.offset) if whole else (one.offset_data, other.offset_data)
        pieces = [bytes(content[start : start + length]) for start in starts]
        for start, piece in zip(starts, reversed(pieces), strict=True):
            content[start : start + length] = piece
        path.write_bytes(content)
        faults = check_dataset(dataset, full=True)
        assert len(faults) == 1 and str(path) in faults[0]
        break


def test_a_deleted_label_is_found(dataset):
    """From the record of a sample, the index's checksum made to fit, as someone would who knows the format."""
    index = read_index(dataset)
    shard = index.shards("train")[0]
    path, table_path = index.shard_path(shard), index.table_path(shard)
    table = read_table(table_path)
    records = table.records.copy()
    records["label"][0] = NO_LABEL
    write_table(table_path, type(table)(records, table.names, table.shard_bytes, table.shard_sha256))
    assert "6 labels, the index says 7" in check_dataset(dataset, full=False)[0]
    write_table(table_path, table)
    content = path.read_bytes()
    start = int(table.records["json_offset"][0])
    record = json.loads(content[start : start + int(table.records["json_bytes"][0])])
    shorter = json.dumps({key: value for key, value in record.items() if key not in ("label", "class")}).encode()
    shorter += b" " * (int(table.records["json_bytes"][0]) - len(shorter))
    changed = content[:start] + shorter + content[start + len(shorter) :]
    path.write_bytes(changed)
    sha256 = hashlib.sha256(changed).hexdigest()
    write_table(table_path, type(table)(table.records, table.names, table.shard_bytes, sha256))
    shards = tuple(replace(shard, sha256=sha256) if other is shard else other for other in index.shards("train"))
    write_index(replace(index, splits={**index.splits, "train": shards}))
    assert check_dataset(dataset, full=False) == []
    (fault,) = check_dataset(dataset, full=True)
    assert str(path) in fault and f"its .json says no label, the index label {record['label']}" in fault


@pytest.mark.parametrize("edit", [
    lambda index: index["classes"].reverse(),
    lambda index: index["classes"].append("cat"),
    lambda index: index.update(classes=None),
    lambda index: index["splits"].update(train=index["splits"]["train"][1:]),
    lambda index: index["splits"].update(train=index["splits"]["train"][:1] * 2 + index["splits"]["train"][2:]),
    lambda index: index["splits"].update(test=index["splits"].pop("train")),
    lambda index: index["splits"]["train"][0].update(samples=6),
    lambda index: index["splits"]["train"][0].update(labelled=6),
    lambda index: index["splits"]["train"][0].update(sha256="0" * 64),
    lambda index: index["splits"]["train"][0].update(bytes=10240),
    lambda index: index.update(fingerprint="0" * 64),
    lambda index: index["statistics"].update(mean=[0.1, 0.2, 0.3]),
    lambda index: index["statistics"].update(mean_encoded_bytes=1.0),
])  # fmt: skip
def test_an_edited_index_is_found(dataset, edit):
    content = json.loads((dataset / "index.json").read_text())
    edit(content)
    (dataset / "index.json").write_text(json.dumps(content))
    assert check_dataset(dataset, full=True)


@pytest.mark.parametrize("at", [5, 700, -5000, -700])
def test_one_changed_byte_anywhere_is_found_by_the_full_check(dataset, at):
    index = read_index(dataset)
    path = index.shard_path(index.shards("train")[-1])
    content = bytearray(path.read_bytes())
    content[at] ^= 0x5A
    path.write_bytes(content)
    faults = check_dataset(dataset, full=True)
    assert len(faults) == 1 and str(path) in faults[0] and "changed" in faults[0]


def test_a_table_whose_offsets_disagree_with_the_tar_is_found_without_reading_everything(dataset):
    index = read_index(dataset)
    path = index.table_path(index.shards("train")[0])
    table = read_table(path)
    records = table.records.copy()
    records["image_offset"][0] += 512
    write_table(path, type(table)(records, table.names, table.shard_bytes, table.shard_sha256))
    assert "no tar header" in check_dataset(dataset, full=False)[0]
    assert "not where its table says" in check_dataset(dataset, full=True)[0]


def test_a_changed_label_is_found(dataset):
    index = read_index(dataset)
    path = index.table_path(index.shards("train")[0])
    table = read_table(path)
    records = table.records.copy()
    records["label"][0] ^= 1
    write_table(path, type(table)(records, table.names, table.shard_bytes, table.shard_sha256))
    assert check_dataset(dataset, full=False) == []
    assert "its .json says label" in check_dataset(dataset, full=True)[0]
