"""The loader: one stream for any number of workers and ranks, with real forked processes, faults and kills."""

import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipeline.config.plan import plan_batches
from pipeline.config.recipe import apply_overrides, parse_overrides, recipe_path, validate
from pipeline.config.training import PretrainConfig
from pipeline.errors import DataError, FaultError
from pipeline.loading.loader import Loader, to_device
from pipeline.loading.stream import SampleStream
from pipeline.shards.index import read_index


def config_of(*paths, settings=()):
    raw = yaml.safe_load(recipe_path("pretrain_mae_debug").read_text())
    raw["data"] = {
        "sources": [{"path": str(path)} for path in paths], "lanes": 4, "window_shards": 1,
        "mean": [0.5] * 3, "std": [0.25] * 3,
    }  # fmt: skip
    raw = apply_overrides(raw, {"global_batch_size": 24, "micro_batch_size": 4} | parse_overrides(settings))
    return validate(PretrainConfig, raw, "test")


def loader(path, *, rank=0, world_size=1, workers=0, first_step=0, last_step=4, skipped=(), settings=()):
    config = config_of(path, settings=settings)
    batches = plan_batches(config.global_batch_size, config.micro_batch_size, world_size)
    stream = SampleStream(config, [read_index(path)])
    return Loader(
        stream, batches, rank=rank, first_step=first_step, last_step=last_step, workers=workers, skipped=skipped
    )


def drawn(made):
    """All batches copied, as (positions, keys, labels, images)."""
    with made:
        return [(b.positions.tolist(), b.keys, b.labels.tolist(), b.images.numpy().copy()) for b in made]


def same(left, right):
    return len(left) == len(right) and all(
        a[:3] == b[:3] and np.array_equal(a[3], b[3]) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_number_of_workers_changes_nothing(digits, workers):
    assert same(drawn(loader(digits, workers=workers)), drawn(loader(digits)))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_together_draw_the_global_batches_of_one(digits, world_size):
    alone = drawn(loader(digits))
    images = {p: (key, i) for batch in alone for p, key, i in zip(batch[0], batch[1], batch[3], strict=True)}
    parts = [drawn(loader(digits, rank=rank, world_size=world_size, workers=1)) for rank in range(world_size)]
    seen = [(p, k, i) for part in parts for batch in part for p, k, i in zip(batch[0], batch[1], batch[3], strict=True)]
    assert sorted(p for p, _, _ in seen) == list(range(4 * 24))
    assert all(images[p][0] == key and np.array_equal(images[p][1], image) for p, key, image in seen)


def test_a_seek_is_bit_exact_also_across_epochs(digits):
    steps = read_index(digits).num_samples("train") // 24 + 3
    assert same(
        drawn(loader(digits, last_step=steps))[-12:], drawn(loader(digits, first_step=steps - 2, last_step=steps))
    )


def test_ranges_passed_over_are_not_drawn(digits):
    positions = [p for batch in drawn(loader(digits, workers=2, skipped=[(24, 48), (50, 51)])) for p in batch[0]]
    assert positions == [*range(24), 48, 49, *range(51, 121)]


def test_the_consumer_may_stop_early_and_come_back(digits):
    with loader(digits, workers=2, last_step=50) as made:
        first, pids = [batch.positions.tolist() for batch in islice(made, 3)], made.workers.pids
    assert first == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_is_killed_is_a_fault_and_not_a_hang(digits):
    with loader(digits, workers=2, last_step=400) as made:
        next(made)
        os.kill(made.workers.pids[0], signal.SIGKILL)
        with pytest.raises(FaultError, match=r"loader-0 \(pid \d+\) was killed by signal 9; if memory ran out, lower"):
            list(made)


def test_workers_leave_stop_requests_to_their_rank(digits):
    with loader(digits, workers=2, last_step=6) as made:
        next(made)
        for pid in made.workers.pids:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(pid, number)
        assert len(list(made)) == 6 * 6 - 1


KILLED = """
import sys, time
from tests.pipeline.loading.test_loader import loader
made = loader(sys.argv[1], workers=3, last_step=400)
next(made)
print(*made.workers.pids, flush=True)
time.sleep(60)
"""


def test_nothing_outlives_a_rank_that_is_killed(digits):
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(digits)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/stat").exists() and _state(pid) != "Z" for pid in pids):
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.02)
    assert set(os.listdir("/dev/shm")) <= before


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return "Z"


@pytest.fixture
def damaged(digits, tmp_path):
    """The digits with three shards: one cut, one with changed bytes, one gone."""
    copy = tmp_path / "damaged"
    shutil.copytree(digits, copy)
    return copy


def _spoil(dataset, how):
    """Damage the first image of the train split as `how` says; its key."""
    from pipeline.shards.table import read_table

    index = read_index(dataset)
    shard = index.shards("train")[0]
    table = read_table(index.table_path(shard))
    path, offset = dataset / shard.name, int(table.records["image_offset"][0])
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, offset + 100)
    else:
        with open(path, "r+b") as file:
            file.seek(offset + (0 if how == "undecodable" else 60))
            file.write(b"\0" * 40)
    return table.key(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_stops_the_stream_at_its_batch_with_shard_and_key(damaged, workers):
    key = _spoil(damaged, "changed")
    last = read_index(damaged).num_samples("train") // 24 + 1
    with (
        loader(damaged, workers=workers, last_step=last, settings=["data.verify=full"]) as made,
        pytest.raises(DataError, match=f"train-000000.tar: sample `{key}.*its bytes have changed"),
    ):
        for batch in made:
            assert key not in batch.keys


@pytest.mark.parametrize(("how", "settings"), [("changed", ["data.verify=full"]), ("undecodable", []), ("missing", [])])
def test_within_a_budget_another_sample_stands_in_and_the_cause_is_counted(damaged, how, settings):
    key = _spoil(damaged, how)
    index = read_index(damaged)
    last = index.num_samples("train") // 24
    wanted = {"settings": [*settings, "data.max_damaged=2000"], "last_step": last}
    with loader(damaged, workers=2, **wanted) as made:
        batches = [(b.positions.tolist(), b.keys, b.damaged) for b in made]
    found = [one for _, _, damage in batches for one in damage]
    expected = "changed" if how == "undecodable" else how  # the checksum is the better explanation
    assert {one.cause for one in found} == {expected}
    assert len({one.position for one in found}) == len(found)
    assert len(found) == (index.shards("train")[0].samples if how == "missing" else 1)
    assert all(len(keys) == 4 and key not in keys for _, keys, _ in batches)
    with loader(damaged, **wanted) as made:  # the same stand-ins without workers
        assert [(b.positions.tolist(), b.keys) for b in made] == [batch[:2] for batch in batches]


def test_normalisation_happens_on_the_device_copy(digits):
    made = loader(digits)
    raw = next(made)
    batch = to_device(raw, torch.device("cpu"), (0.5,) * 3, (0.25,) * 3, torch.float32)
    assert batch.images.shape == (4, 3, *raw.images.shape[1:3]) and batch.images.is_contiguous()
    expected = (raw.images[1, 2, 3, 0].item() / 255 - 0.5) / 0.25
    assert batch.images[1, 0, 2, 3].item() == pytest.approx(expected, abs=1e-6)
    kept = batch.images.clone()
    next(made)
    assert torch.equal(batch.images, kept), "the batch must not change when its slot is written again"
