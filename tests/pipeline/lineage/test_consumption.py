"""When a sample was read: held to reading the whole run, and to what real ranks recorded."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.lineage.consumption import Consumption, Seen, ranges_in_words
from pipeline.loading.sources import open_sources
from pipeline.loading.stream import SampleStream
from pipeline.shards.order import pass_over
from pipeline.shards.reader import ShardReader
from pipeline.shards.tombstones import TOMBSTONES_NAME
from tests.pipeline.loading.test_left_out import take_down
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.runs import BATCH, new_run

STEPS = 30


@pytest.fixture
def dataset(pictures, tmp_path):
    return Path(shutil.copytree(pictures, tmp_path / "dataset"))


def sources_of(run):
    return open_sources(read_run_config(run.path).data)


def reading_of(run, step=STEPS, skipped=(), tombstones=()):
    config = read_run_config(run.path).model_dump(mode="json")
    return {"config": config, "step": step, "skipped": list(skipped), "tombstones": list(tombstones), "damaged": 0}


def read_step_by_step(run, steps, skipped=()):
    """{(key): [steps from 1]} of what the stream gives now."""
    stream = SampleStream(read_run_config(run.path), sources_of(run).indexes)
    met = {}
    for step in steps:
        for key in stream.keys(pass_over(np.arange(step * BATCH, (step + 1) * BATCH), skipped)):
            met.setdefault(key, []).append(step + 1)
    return met


def all_seen(consumption):
    """{key: steps} by the inverse."""
    found = {}
    for source, index in enumerate(consumption.indexes):
        reader = ShardReader(index, "train")
        for shard, size in enumerate(reader.shard_sizes):
            for sample, key in zip(range(size), reader.keys(shard), strict=True):
                if steps := consumption.seen(source, shard, sample).steps:
                    found.setdefault(key, []).extend(steps)
    return {key: sorted(steps) for key, steps in found.items()}


@pytest.mark.parametrize("settings", [[], ["data.window_shards=4"], ["data.label_fraction=0.3"], ["data.lanes=3"]])
@pytest.mark.parametrize("skipped", [[], [(12, 36), (100, 101)]])
def test_every_sample_was_read_when_a_reading_of_the_whole_run_meets_it(dataset, tmp_path, settings, skipped):
    run = new_run(tmp_path, str(dataset), *settings, ranks=1)
    consumption = Consumption(reading_of(run, skipped=skipped), sources_of(run).indexes)
    assert all_seen(consumption) == read_step_by_step(run, range(STEPS), skipped)


def test_so_it_is_in_a_mixture(dataset, tmp_path):
    other = small_dataset(tmp_path / "other", per_class=11, splits="folders", split_fractions={"train": 1.0})
    run = new_run(tmp_path, [f"{dataset}=3", f"{other.directory}=1"], ranks=1)
    consumption = Consumption(reading_of(run), sources_of(run).indexes)
    assert all_seen(consumption) == read_step_by_step(run, range(STEPS))


def test_a_sample_that_was_taken_down_on_the_way_was_read_before_and_its_stand_in_more_often_after(dataset, tmp_path):
    run = new_run(tmp_path, str(dataset), ranks=1)
    before = read_step_by_step(run, range(10))
    gone = take_down(dataset, (2, 3), (2, 4), (5, 8))
    held = [{"step": 10, "sources": sources_of(run).tombstones}]
    after = read_step_by_step(run, range(10, STEPS))
    take_down(dataset, (0, 0))  # behind the end of the run: the list has grown since
    seen = all_seen(Consumption(reading_of(run, tombstones=held), sources_of(run).indexes))
    assert seen == {key: before.get(key, []) + after.get(key, []) for key in before.keys() | after.keys()}
    assert not set(gone) & after.keys() and set(gone) & seen.keys()


def test_another_list_than_the_run_read_by_is_told(dataset, tmp_path):
    run = new_run(tmp_path, str(dataset), ranks=1)
    take_down(dataset, (2, 3))
    held = [{"step": 10, "sources": sources_of(run).tombstones}]
    (dataset / TOMBSTONES_NAME).unlink()
    with pytest.raises(InputError, match="not the one that the run read by"):
        Consumption(reading_of(run, tombstones=held), sources_of(run).indexes)


def test_only_steps_behind_the_checkpoint_count_and_epochs_are_named(dataset, tmp_path):
    run = new_run(tmp_path, str(dataset), ranks=1)
    whole, part = (Consumption(reading_of(run, step=step), sources_of(run).indexes) for step in (27, 10))
    one, beginning = whole.seen(0, 3, 3), part.seen(0, 3, 3)
    assert one.epochs == [0, 1, 2] and all((step - 1) // 9 == epoch for epoch, step in zip(*one, strict=True))
    assert beginning.steps == [step for step in one.steps if step <= 10]
    assert Consumption(reading_of(run, step=0), sources_of(run).indexes).seen(0, 3, 3).steps == []


def test_numbers_in_words():
    assert ranges_in_words([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert Seen([0, 1, 2], [4, 9, 30]).in_words() == "seen 3 times: epochs 0-2, steps 4, 9, 30"
