"""Samples on a tombstone list: never read again, others keep their places, and the same sample stands in anywhere."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.data import DataConfig, Source
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.loading.evaluation_stream import EvaluationStream
from pipeline.loading.left_out import num_scored
from pipeline.loading.sources import Sources, open_sources
from pipeline.loading.stream import SampleStream
from pipeline.preparation.write import run_path
from pipeline.run_directory import RunDirectory
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from pipeline.shards.tombstones import TOMBSTONES_NAME, Tombstone, add_tombstone
from pipeline.training.validation import evaluation_input
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.runs import STEPS, new_run, recorded, train_until
from tests.ranks import run_on_ranks


def take_down(directory: Path, *places: tuple[int, int], split: str = "train") -> list[str]:
    """Put samples of a dataset on its list; their keys."""
    index = read_index(directory)
    reader, keys = ShardReader(index, split), []
    for shard, sample in places:
        keys.append(reader.keys(shard)[sample])
        name = index.shards(split)[shard].name
        add_tombstone(Path(directory), Tombstone(keys[-1], split, name, "0" * 64, "2026-01-01T00:00:00+0000", "asked"))
    return keys


@pytest.fixture
def dataset(pictures, tmp_path):
    return Path(shutil.copytree(pictures, tmp_path / "dataset"))


def stream_of(run: RunDirectory) -> SampleStream:
    config = read_run_config(run.path)
    return SampleStream(config, open_sources(config.data).indexes)


def test_the_next_sample_of_the_shard_stands_in_and_all_others_stay(dataset, tmp_path):
    run = new_run(tmp_path, str(dataset), ranks=1)
    positions = np.arange(3 * 108)
    before, tables = stream_of(run).keys(positions), ShardReader(read_index(dataset), "train")
    gone = take_down(dataset, (2, 3), (2, 4), (5, 8))  # two neighbours, and the last of a shard
    after = stream_of(run)
    stand_in = dict(zip(gone, [tables.keys(2)[5], tables.keys(2)[5], tables.keys(5)[0]], strict=True))
    assert after.keys(positions) == [stand_in.get(key, key) for key in before]
    assert after.num_left_out(positions) == 9 == sum(key in gone for key in before)
    height, width, channels = after.image_shape
    keys, damaged = after.fill(
        positions[:108], np.empty((108, height, width, channels), after.dtype), np.empty(108, np.int64)
    )
    assert keys == after.keys(positions[:108]) and not damaged


def test_a_list_that_leaves_nothing_is_refused_by_training_and_validation(dataset, tmp_path):
    run = new_run(tmp_path, str(dataset), ranks=1)
    take_down(dataset, *((shard, sample) for shard in range(12) for sample in range(9)))
    with pytest.raises(InputError, match="every sample"):
        stream_of(run)


def test_validation_leaves_them_out_and_counts_the_others(tmp_path):
    directory = small_dataset(tmp_path, splits="hash", split_fractions={"train": 0.5, "validation": 0.5}).directory
    run = new_run(tmp_path, str(directory), "validation.every_steps=0", ranks=1)
    config, sources = read_run_config(run.path), Sources((read_index(directory),), (1.0,))

    def stream_of_split(index):
        return EvaluationStream([index], "validation", 4, evaluation_input(config), sources.classes)

    whole = stream_of_split(read_index(directory))
    gone = take_down(directory, (0, 0), (0, 3), split="validation")
    scored = stream_of_split(read_index(directory))
    assert num_scored(read_index(directory), "validation") == scored.num_samples
    assert read_index(directory).remaining_fingerprint != sources.indexes[0].remaining_fingerprint
    assert scored.num_samples == whole.num_samples - 2

    def keys(stream):
        rows = np.arange(stream.rows)
        images = np.empty((len(rows), *stream.image_shape), stream.dtype)
        return [key for key in stream.fill(rows, images, np.empty(len(rows), np.int64))[0] if key]

    assert keys(scored) == [key for key in keys(whole) if key not in gone]


@pytest.mark.slow
def test_a_run_that_resumes_leaves_out_what_was_taken_down_meanwhile_and_says_so(dataset, tmp_path):
    run = new_run(tmp_path, str(dataset), "checkpoint.every_steps=3")
    before = stream_of(run).keys(np.arange(STEPS * 12))
    run_on_ranks(train_until, 2, str(run.path), 1, 6)
    gone = take_down(dataset, (2, 3), (7, 0))
    run_on_ranks(train_until, 2, str(run.path), 2, STEPS)
    now = stream_of(run).keys(np.arange(STEPS * 12))
    read = recorded(run)
    assert [key for _, key in read] == before[:72] + now[72:] and not {key for _, key in read[72:]} & set(gone)
    manifest = run.newest_checkpoint().manifest
    assert manifest["left_out"] == sum(key in gone for key in before[72:]) > 0
    assert [(entry["step"], entry["sources"][0]["count"]) for entry in manifest["tombstones"]] == [(6, 2)]
    assert "on its tombstone list: 2 samples" in run.attempt(2).events.read_text()


def test_the_same_command_after_a_take_down_is_another_run(dataset, tmp_path):
    from flows.requests.training import prepared_training
    from pipeline.preparation.placement import Placement

    def path():
        prepared = prepared_training(
            "pretrain", "pretrain_mae_debug", data=str(dataset), placement=Placement("local", 1, 1, 1, 0),
            overrides=["steps=3"], home=tmp_path, rehearse="never", model=None,
        )  # fmt: skip
        return run_path(prepared, tmp_path, None), prepared.plan["data"]

    (first, plan), _ = path(), take_down(dataset, (0, 0))
    (second, changed) = path()
    assert first != second and "tombstones" not in plan and changed["tombstones"][0]["count"] == 1
    assert plan["fingerprint"] == changed["fingerprint"]


def test_a_list_that_is_damaged_or_names_what_is_not_there_is_told(dataset):
    take_down(dataset, (0, 0))
    assert check_dataset(dataset, full=False) == []
    (dataset / TOMBSTONES_NAME).write_text(
        '{"key": "nobody", "split": "train", "shard": "train-000000.tar", "sha256": "", "date": "", "reason": ""}\n'
    )
    assert "`nobody` is not in split `train`" in check_dataset(dataset, full=False)[0]
    (dataset / TOMBSTONES_NAME).write_text('{"key": "half')
    with pytest.raises(InputError, match="line 1: no tombstone"):
        open_sources(DataConfig(sources=(Source(path=str(dataset)),)))


def test_the_same_sample_is_put_on_the_list_once_and_a_torn_line_does_not_swallow_the_next(dataset):
    assert take_down(dataset, (0, 0)) == take_down(dataset, (0, 0))
    assert len(read_index(dataset).tombstones) == 1
    path = dataset / TOMBSTONES_NAME
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    take_down(dataset, (1, 1))
    assert len(read_index(dataset).tombstones) == 2


def test_what_is_left_out_is_looked_up_once(dataset, monkeypatch):
    take_down(dataset, (2, 3), (7, 0))
    index, looked_up = read_index(dataset), []
    places = ShardReader.places_of_tombstone
    monkeypatch.setattr(
        ShardReader, "places_of_tombstone", lambda self, stone: looked_up.append(stone) or places(self, stone)
    )
    reader = ShardReader(index, "train")
    assert reader.left_out() == reader.left_out() == {(2, 3), (7, 0)} and len(looked_up) == 2
    total = index.num_samples("train")
    assert num_scored(index, "train") == num_scored(index, "train") == total - 2 and len(looked_up) == 4
    take_down(dataset, (0, 0))
    assert num_scored(read_index(dataset), "train") == total - 3, "a list that has grown is another"
