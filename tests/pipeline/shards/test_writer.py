"""What we write, other programs read."""

import hashlib
import json
import subprocess
import tarfile

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from pipeline.shards.table import read_table, split_member
from pipeline.shards.writer import Expected, NewSample, member_header, write_shard
from tests.pipeline.pictures import small_dataset


def samples(count):
    return [
        NewSample(f"key-{number}", "jpg", bytes([number]) * (number * 100 + 1), {"source": f"{number}"}, number)
        for number in range(count)
    ]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, samples(5))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def test_the_table_that_is_read_is_the_one_that_was_written(tmp_path):
    written = write_shard(tmp_path / "a.tar", samples(5))
    table = read_table(tmp_path / "a.idx")
    assert np.array_equal(table.records, written.records)
    assert [table.key(number) for number in range(5)] == [f"key-{number}" for number in range(5)]
    assert table.shard_bytes == (tmp_path / "a.tar").stat().st_size


def test_no_samples_write_no_files(tmp_path):
    assert write_shard(tmp_path / "a.tar", []) is None
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing_behind(tmp_path):
    def failing():
        yield samples(1)[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "a.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_table_is_an_error(tmp_path):
    (tmp_path / "a.idx").write_bytes(b"x" * 500)
    with pytest.raises(DataError, match="not a sample table"):
        read_table(tmp_path / "a.idx")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.jpg", ("a", "jpg")),
        ("d.d/a.b.JPG", ("d.d/a", "b.jpg")),
        ("a", ("", "")),
        (".hidden.jpg", ("", "")),
        ("d/.jpg", ("d/", "jpg")),
        ("d.d/.jpg", ("", "")),
    ],
)
def test_members_are_split_as_webdataset_splits_them(name, expected):
    from webdataset.tariterators import base_plus_ext

    theirs = base_plus_ext(name)
    assert split_member(name) == expected == ((theirs[0], theirs[1].lower()) if theirs[0] else ("", ""))


def test_webdataset_and_tar_read_every_sample_we_write(tmp_path):
    import webdataset as wds

    index = read_index(small_dataset(tmp_path).directory)
    for split, shards in index.splits.items():
        reader = ShardReader(index, split)
        ours = [
            (reader.read(shard, number), reader.record(shard, number))
            for shard, size in enumerate(reader.shard_sizes)
            for number in range(size)
        ]
        paths = [str(index.shard_path(shard)) for shard in shards]
        theirs = list(wds.WebDataset(paths, shardshuffle=False))
        assert [sample["__key__"] for sample in theirs] == [sample.key for sample, _ in ours]
        for found, (sample, record) in zip(theirs, ours, strict=True):
            assert found[sample.extension] == sample.image
            assert json.loads(found["json"]) == record
        for path, shard in zip(paths, shards, strict=True):
            listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
            assert len(listed.stdout.split()) == 2 * shard.samples and listed.stderr == ""


def test_a_shard_of_small_members_alone_is_written_as_it_comes(tmp_path):
    half = []

    def pictures():
        for number in range(4000):
            if number == 3000:
                (partial,) = tmp_path.iterdir()
                half.append(partial.stat().st_size)
            yield NewSample(f"key{number}", "png", bytes(1000), {"n": number})

    table = write_shard(tmp_path / "a.tar", pictures())
    whole = (tmp_path / "a.tar").read_bytes()
    assert half[0] > len(whole) // 2
    assert (len(whole), hashlib.sha256(whole).hexdigest()) == (table.shard_bytes, table.shard_sha256)


@pytest.mark.parametrize("name", ["", "a.jpg", "a" * 96 + ".jpg", "a" * 97 + ".jpg", "b/" + "c" * 120, "n\u00e4me.jpg"])
@pytest.mark.parametrize("num_bytes", [0, 1, 512, 1_234_567, (1 << 33) - 1, 1 << 33])
def test_headers_are_those_of_tarfile(name, num_bytes):
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    assert member_header(name, num_bytes) == member.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("expected", [None, Expected(1, 10), Expected(1000, 1 << 26)], ids=["", "less", "more"])
def test_samples_of_any_size_and_number_make_a_whole_tar(tmp_path, expected):
    contents = [bytes(size) for size in (*range(0, 3000, 7), 2_000_000, 3, 1 << 20)]
    samples = [NewSample(f"key{number}", "jpg", content, {"n": number}) for number, content in enumerate(contents)]
    table = write_shard(tmp_path / "train-000000.tar", samples, expected)
    whole = (tmp_path / "train-000000.tar").read_bytes()
    assert (len(whole), hashlib.sha256(whole).hexdigest()) == (table.shard_bytes, table.shard_sha256)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert [tar.extractfile(f"key{number}.jpg").read() for number in range(len(contents))] == contents
    offsets = table.records["image_offset"].tolist()
    assert all(whole[at : at + len(content)] == content for at, content in zip(offsets, contents, strict=True))
