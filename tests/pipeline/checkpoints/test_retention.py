"""Which checkpoints stay, how often one is made, and what is said where there is no room for them."""

import math
import shutil
from collections import namedtuple

import pytest

from pipeline.checkpoints.cadence import FIRST_SECONDS, LONGEST_SECONDS, Cadence, best_interval_seconds
from pipeline.checkpoints.retention import BestSoFar, best_checkpoint, prune_checkpoints, require_room
from pipeline.config.checkpoint import CheckpointConfig
from pipeline.config.plan import StepPlan
from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory, write_json


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    write_json(tmp_path / "job.json", {"attempt": 2})
    return RunDirectory(tmp_path)


def commit(run: RunDirectory, step: int, **validation: float) -> None:
    directory = run.checkpoints / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "file").write_bytes(b"12345678")
    write_json(directory / "manifest.json", {"step": step, "files": {"file": {"bytes": 8}}, "validation": validation})


def steps(run: RunDirectory) -> list[int]:
    return [checkpoint.step for checkpoint in run.committed_checkpoints()]


def test_the_newest_every_nth_and_the_best_stay(run):
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7), (40, 0.9), (50, 0.8), (60, 0.8)):
        commit(run, step, accuracy=accuracy)
    config = CheckpointConfig(keep=2, keep_every_steps=30)
    removed = prune_checkpoints(run, config, ("accuracy", "max"))
    assert steps(run) == [60, 50, 40, 30] and set(removed) == {"step-00000010", "step-00000020"}
    prune_checkpoints(run, config, ("accuracy", "min"))
    assert steps(run) == [60, 50, 30]
    prune_checkpoints(run, CheckpointConfig(keep=1), ("not measured", "min"))
    assert steps(run) == [60]


def test_the_last_before_the_rate_falls_stays_for_a_longer_run(run, monkeypatch):
    write_json(run.plan_file, {"steps": StepPlan(1000, 100, 0, cooldown_samples=650)._asdict()})  # falls after step 35
    for step in (10, 20, 30, 40, 50, 60):
        commit(run, step)
    prune_checkpoints(run, CheckpointConfig(keep=2))
    assert steps(run) == [60, 50, 30]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(100, 100, 0))
    with pytest.raises(InputError, match="for 4 checkpoints"):
        require_room(run, CheckpointConfig(keep=2), 10)


def test_a_score_that_is_no_number_is_never_the_best(run):
    for step, loss in ((10, 0.9), (20, 0.5), (30, math.nan)):
        commit(run, step, loss=loss)
    assert best_checkpoint(run.committed_checkpoints(), ("loss", "min")).step == 20
    assert best_checkpoint(run.committed_checkpoints(), ("loss", "max")).step == 10
    assert best_checkpoint(run.committed_checkpoints(), ("accuracy", "max")) is None


def test_the_best_so_far_is_that_of_the_attempts_before_too(run):
    commit(run, 10, loss=0.5)
    so_far = BestSoFar(run.committed_checkpoints(), ("loss", "min"))
    told = [so_far.take({"loss": loss}) for loss in (0.6, math.nan, 0.5, 0.4, 0.45)]
    assert told == [False, False, True, True, False]
    assert not BestSoFar([], ("loss", "min")).take({"accuracy": 1.0}) and not BestSoFar([], None).take({"loss": 0.1})


def test_what_does_not_verify_counts_for_nothing_and_what_was_left_behind_goes(run):
    for step in (10, 20, 30):
        commit(run, step)
    (run.checkpoints / "step-00000030" / "file").write_bytes(b"short")
    for left in ("step-00000040.attempt-01.partial", "step-00000020.damaged", "step-00000050.attempt-02.partial"):
        (run.checkpoints / left).mkdir()
    prune_checkpoints(run, CheckpointConfig(keep=1))
    assert steps(run) == [20]
    names = {path.name for path in run.checkpoints.iterdir()}
    assert names == {"step-00000020", "step-00000030", "step-00000050.attempt-02.partial"}


def test_a_disk_without_room_is_named_before_the_first_step(run, monkeypatch):
    usage = namedtuple("usage", "total used free")(100, 70, 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    config = CheckpointConfig(keep=2)
    require_room(run, config, 10)
    with pytest.raises(InputError, match=r"checkpoints: 0.0 MiB free, .* for 3 checkpoints .*lower checkpoint.keep"):
        require_room(run, config, 11)
    with pytest.raises(InputError, match="for 4 checkpoints"):
        require_room(run, config, 10, best=("accuracy", "max"))
    commit(run, 10)
    require_room(run, config, 12)  # the one that is there takes no more room
    for step in (20, 30):
        commit(run, step)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5))
    with pytest.raises(InputError, match="for 3 checkpoints"):
        require_room(run, config, 10)  # the oldest goes behind the next commit only


def test_what_was_set_aside_by_a_longer_run_goes_once_it_has_come_as_far_again(run):
    commit(run, 10)
    (run.checkpoints / "step-00000020.cooled").mkdir()
    prune_checkpoints(run, CheckpointConfig(keep=1))
    assert (run.checkpoints / "step-00000020.cooled").is_dir()
    commit(run, 20)
    prune_checkpoints(run, CheckpointConfig(keep=1))
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000020"]


def test_those_kept_at_intervals_need_room_too(run, monkeypatch):
    write_json(run.plan_file, {"steps": StepPlan(1000, 100, 0)._asdict()})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(100, 0, 100))
    require_room(run, CheckpointConfig(keep=2, keep_every_steps=20), 12)
    with pytest.raises(InputError, match=r"for 8 checkpoints .*keep_every_steps=20"):
        require_room(run, CheckpointConfig(keep=2, keep_every_steps=20), 13)


def test_weights_written_at_a_cadence_need_room_too_but_for_those_that_are_there(run, monkeypatch):
    write_json(run.plan_file, {"steps": StepPlan(1000, 100, 0)._asdict()})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(100, 0, 100))
    config = CheckpointConfig(keep=2, weights_every_steps=10)
    require_room(run, config, 20, 4)
    with pytest.raises(InputError, match=r"for 3 checkpoints .* and 10 times the weights .*weights_every_steps=10"):
        require_room(run, config, 20, 5)
    for step in (10, 20):
        (run.weights / f"step-{step:08d}").mkdir(parents=True)
        (run.weights / f"step-{step:08d}" / "model.safetensors").write_bytes(b"12345")
    require_room(run, config, 20, 5)


def test_the_best_interval_loses_the_least_of_all():
    cost, between = 30.0, 8 * 3600.0

    def lost(interval: float) -> float:
        """Expected time per second of work, restarts free (Daly, 2006, equation 13)."""
        return between * (math.exp((interval + cost) / between) - 1) / interval

    best = best_interval_seconds(cost, between)
    assert best == pytest.approx(math.sqrt(2 * cost * between), rel=0.05)
    assert all(lost(best) <= lost(best * factor) for factor in (0.9, 1.1))
    assert best_interval_seconds(3.0, 1.0) == 1.0


def test_the_clock_asks_early_once_and_then_as_often_as_pays():
    cadence = Cadence(hours_between_failures=6400, nodes=128, now=0.0)
    assert not cadence.is_time(FIRST_SECONDS - 1) and cadence.is_time(FIRST_SECONDS)
    cadence.saved(FIRST_SECONDS)
    cadence.measured(stall_seconds=1.0, seconds=20.0)
    assert cadence.interval_seconds == pytest.approx(600, rel=0.01)  # sqrt(2 x 1 s x 50 h)
    assert not cadence.is_time(FIRST_SECONDS + 590) and cadence.is_time(FIRST_SECONDS + 610)
    cadence.measured(stall_seconds=0.001, seconds=20.0)
    assert cadence.interval_seconds == 200.0  # writing takes a tenth of the time at most
    cadence.measured(stall_seconds=60.0, seconds=200.0)
    assert cadence.interval_seconds == LONGEST_SECONDS
