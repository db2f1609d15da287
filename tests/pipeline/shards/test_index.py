"""index.json: what is read is what was written, and everything else is one line with a hint."""

import json
import os

import pytest

from pipeline.errors import InputError
from pipeline.shards.index import DatasetIndex, ImageStatistics, Shard, read_index, write_index
from tests.pipeline.pictures import small_dataset


def example(directory):
    shards = (
        Shard("train-000000.tar", 10240, "ab" * 32, 3, 3),
        Shard("train-000001.tar", 20480, "cd" * 32, 2, 1, "/x/y.tar"),
    )
    statistics = ImageStatistics((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 812.5, (8.0, 9.5, 12.0), (8.0, 8.0, 8.0))
    return DatasetIndex(
        directory, "ef" * 32, {"train": shards}, ("ant", "bee"), statistics, {"made_from": {"source": "/x"}}
    )


def test_an_index_is_read_as_it_was_written(tmp_path):
    index = example(tmp_path)
    write_index(index)
    assert read_index(str(tmp_path)) == index
    assert (index.num_samples("train"), index.num_classes, index.labelled) == (5, 2, False)
    assert str(index.shard_path(index.shards("train")[1])) == "/x/y.tar"
    assert index.table_path(index.shards("train")[1]) == tmp_path / "train-000001.idx"


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "vit ingest SOURCE DEST"),
        ("{", "cannot be read"),
        ("[]", "not a dataset index"),
        ('{"format_version": 1}', "not a dataset index"),
        ('{"format_version": 3}', "newer than 2"),
    ],
)
def test_a_directory_without_a_readable_index_is_one_line_with_a_hint(tmp_path, content, words):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(InputError, match=words) as caught:
        read_index(tmp_path)
    assert len(caught.value.problems) == 1 and str(tmp_path / "index.json") in caught.value.problems[0]


def test_a_path_that_does_not_exist_says_so(tmp_path):
    with pytest.raises(InputError, match="no such dataset.*vit ingest"):
        read_index(tmp_path / "nowhere")


def test_a_number_written_as_text_is_refused(tmp_path):
    write_index(example(tmp_path))
    content = json.loads((tmp_path / "index.json").read_text())
    content["splits"]["train"][0]["samples"] = "3"
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not a dataset index .*bytes, samples and labelled are numbers"):
        read_index(tmp_path)


def test_an_unknown_key_of_a_shard_is_refused_rather_than_ignored(tmp_path):
    write_index(example(tmp_path))
    content = json.loads((tmp_path / "index.json").read_text())
    content["splits"]["train"][0]["codec"] = "zstd"
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="codec"):
        read_index(tmp_path)


def test_cut_and_missing_shards_are_named_when_sizes_are_checked(tmp_path):
    directory = small_dataset(tmp_path).directory
    index = read_index(directory, check_sizes=True)
    cut, missing = index.shards("train")[:2]
    os.truncate(index.shard_path(cut), cut.bytes - 1024)
    index.shard_path(missing).unlink()
    with pytest.raises(InputError) as caught:
        read_index(directory, check_sizes=True)
    assert [name in problem for name, problem in zip((cut.name, missing.name), caught.value.problems, strict=True)] == [
        True
    ] * 2
    assert read_index(directory) == index
