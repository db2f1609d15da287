"""Samples by offset; a cut or changed shard is always an error that names it."""

import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import DataError, InputError
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.pictures import small_dataset


@pytest.fixture
def index(tmp_path):
    return read_index(small_dataset(tmp_path).directory)


def all_samples(reader):
    return [reader.read(shard, sample) for shard, size in enumerate(reader.shard_sizes) for sample in range(size)]


def test_every_sample_is_read_with_its_label_and_its_record(index):
    reader = ShardReader(index, "train")
    samples = all_samples(reader)
    assert len({sample.key for sample in samples}) == index.num_samples("train") == reader.shard_sizes.sum()
    record = reader.record(1, 2)
    sample = reader.read(1, 2)
    assert record["sha256"] == hashlib.sha256(sample.image).hexdigest()
    assert record["class"] == index.classes[sample.label] and record["source"].startswith(record["class"])
    assert sample.extension in ("jpg", "png") and sample.shard == index.shards("train")[1].name
    assert (record["width"], record["height"]) == (24, 16)


def test_few_files_stay_open_whatever_the_number_of_shards(index):
    reader = ShardReader(index, "train", max_open_shards=2)
    before = len(os.listdir("/proc/self/fd"))
    all_samples(reader)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_may_be_pickled_forked_and_shared_by_threads(index):
    reader = ShardReader(index, "train", max_open_shards=1)
    expected = all_samples(reader)
    assert all_samples(pickle.loads(pickle.dumps(reader))) == expected
    with ThreadPoolExecutor(4) as threads:
        assert all(result == expected for result in threads.map(lambda _: all_samples(reader), range(8)))
    child = os.fork()
    if child == 0:
        os._exit(0 if all_samples(reader) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all_samples(reader) == expected


def test_a_split_that_is_not_there_is_an_input_error_with_the_ones_that_are(index):
    with pytest.raises(InputError, match="no split `trian`; there are: train"):
        ShardReader(index, "trian")


def test_a_shard_cut_anywhere_is_an_error_that_names_it_when_opened(index):
    shard = index.shards("train")[0]
    path = index.shard_path(shard)
    for size in range(shard.bytes - 1, 0, -509):
        os.truncate(path, size)
        with pytest.raises(DataError, match=f"{path}.*vit check.*met at sample `"):
            ShardReader(index, "train").read(0, 0)


def test_a_shard_cut_under_an_open_reader_is_an_error_and_never_fewer_samples(index):
    shard = index.shards("train")[0]
    path = index.shard_path(shard)
    reader = ShardReader(index, "train")
    expected = [reader.read(0, sample) for sample in range(shard.samples)]
    for size in range(shard.bytes - 1, 0, -997):
        os.truncate(path, size)
        intact = 0
        for sample in range(shard.samples):
            try:
                assert reader.read(0, sample) == expected[sample]
                intact += 1
            except DataError as error:
                assert str(path) in str(error) and expected[sample].key in str(error)
        assert intact <= shard.samples
    assert intact == 0


def test_a_changed_byte_in_an_image_is_an_error(index):
    shard = index.shards("train")[0]
    path = index.shard_path(shard)
    expected = ShardReader(index, "train").read(0, 0)
    content = path.read_bytes()
    at = content.index(expected.image) + len(expected.image) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(DataError, match=f"{expected.key}.*changed"):
        ShardReader(index, "train").read(0, 0)


def test_a_table_of_another_shard_is_an_error(index):
    first, second = index.shards("train")[:2]
    index.table_path(first).write_bytes(index.table_path(second).read_bytes())
    with pytest.raises(DataError, match="another version of its shard"):
        ShardReader(index, "train").read(0, 0)


def test_a_table_cut_anywhere_is_an_error(index):
    path = index.table_path(index.shards("train")[0])
    for size in range(path.stat().st_size - 1, -1, -37):
        os.truncate(path, size)
        with pytest.raises(DataError, match=str(path)):
            ShardReader(index, "train").read(0, 0)


def test_a_missing_shard_or_table_is_an_error(index):
    shard, other = index.shards("train")[:2]
    index.shard_path(shard).unlink()
    index.table_path(other).unlink()
    for number in (0, 1):
        with pytest.raises(DataError, match="No such file"):
            ShardReader(index, "train").read(number, 0)


def test_without_verifying_a_read_checks_the_size_alone(index):
    shard = index.shards("train")[0]
    path = index.shard_path(shard)
    reader = ShardReader(index, "train")
    expected = reader.read(0, 0)
    content = path.read_bytes()
    path.write_bytes(content.replace(expected.image, bytes(len(expected.image))))
    assert set(reader.read(0, 0, verify=False).image) == {0}
    os.truncate(path, shard.bytes // 2)
    with pytest.raises(DataError, match="ends"):
        reader.read(0, shard.samples - 1, verify=False)


def test_an_error_says_its_cause_shard_and_key_also_after_it_was_pickled(index):
    shard, other, third = index.shards("train")[:3]
    reader = ShardReader(index, "train")
    keys = [reader.keys(number)[0] for number in range(3)]
    content = bytearray(index.shard_path(shard).read_bytes())
    content[: len(content)] = bytes(len(content))
    index.shard_path(shard).write_bytes(content)
    os.truncate(index.shard_path(other), 100)
    causes = {}
    for number in range(2):
        with pytest.raises(DataError) as caught:
            reader.read(number, 0)
        error = pickle.loads(pickle.dumps(caught.value))
        assert str(error) == str(caught.value)
        causes[error.shard, error.key] = error.cause
    assert causes == {(shard.name, keys[0]): "changed", (other.name, keys[1]): "cut"}
    index.shard_path(third).unlink()
    with pytest.raises(DataError) as caught:
        ShardReader(index, "train").read(2, 0)
    assert (caught.value.cause, caught.value.shard, caught.value.key) == ("missing", third.name, keys[2])
