"""`vit check`: silent on a sound dataset, and a named file for every fault."""

import os
import shutil

import pytest

from pipeline.errors import InputError
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from pipeline.shards.table import read_table, write_table
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


def test_a_changed_label_is_found_through_the_fingerprint(dataset):
    index = read_index(dataset)
    path = index.table_path(index.shards("train")[0])
    table = read_table(path)
    records = table.records.copy()
    records["label"][0] ^= 1
    write_table(path, type(table)(records, table.names, table.shard_bytes, table.shard_sha256))
    assert check_dataset(dataset, full=False) == []
    assert "fingerprint" in check_dataset(dataset, full=True)[0]
