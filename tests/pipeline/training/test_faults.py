"""Ranks that hang, die or fail: one verdict that names the cause, and a run that goes on as if nothing had happened.

The supervisor is the real one; its ranks come from the pool.
"""

import json
import random
import time

import pytest

from pipeline.checkpoints.files import read_weights
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_FAULT
from pipeline.run_directory import RunDirectory
from tests.pipeline.training.runs import new_run, recorded
from tests.pipeline.training.supervised import Fault, end, fail, hang, kill, supervise

HANG_SECONDS = 6
pytestmark = pytest.mark.slow


def test_a_rank_that_hangs_is_named_with_its_phase_step_and_place(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures))
    environment = {"VIT_COLLECTIVE_TIMEOUT_SECONDS": str(HANG_SECONDS)}
    code, reason = supervise(run, Fault(1, "forward", 4, hang), environment=environment)
    assert time.time() - last_step_written(run) < HANG_SECONDS + 10
    assert code == EXIT_FAULT
    assert (
        reason.startswith("rank 1 hung in forward of step 5 for ") and "in hang; the stacks of all ranks: " in reason
    ), reason
    for rank in (0, 1):
        assert "Current thread" in run.attempt(1).stacks(rank).read_text()


def last_step_written(run: RunDirectory) -> float:
    return json.loads(run.attempt(1).ledger.read_text().splitlines()[-1])["time"]


@pytest.mark.parametrize(
    ("strike", "code", "words"),
    [
        (end, EXIT_FAULT, "rank 1 ended with code 3 in forward of step 4, without an exit record"),
        (kill, EXIT_FAULT, "rank 1 was killed by signal 9 in forward of step 4, without an exit record"),
        (fail, EXIT_FAILED, "rank 1: ValueError: the first exception"),
    ],
)
def test_a_rank_that_dies_or_fails_is_named_and_its_peer_is_not(strike, code, words, pictures, tmp_path):
    run = new_run(tmp_path, str(pictures))
    assert supervise(run, Fault(1, "forward", 3, strike)) == (code, words)
    (peer,) = [record for record in run.attempt(1).exit_records() if record.rank == 0]
    assert peer.code == EXIT_FAULT and peer.reason.startswith("a collective broke")


def test_a_loader_that_hangs_is_found_behind_the_rank_that_waits_for_it(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures))
    environment = {"VIT_COLLECTIVE_TIMEOUT_SECONDS": str(HANG_SECONDS)}
    code, reason = supervise(run, Fault(1, "data", 4, _stop_workers), environment=environment)
    assert code == EXIT_FAULT
    assert reason.startswith("rank 1 hung in data of step ") and "workers.py" in reason and "in collect" in reason


def _stop_workers() -> None:
    """As a mount that does not answer: the workers of this rank stand still."""
    import multiprocessing
    import os
    import signal

    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)


KILLS, STEPS, EVERY = 18, 60, 3


def kill_at_random(run: RunDirectory, draw: random.Random) -> Fault:
    """SIGKILL for one of two ranks, within the next steps of the run: in a phase, or some milliseconds into it."""
    newest = run.newest_checkpoint()
    step = min((newest.step if newest else 0) + draw.randrange(2 * EVERY), STEPS - 1)
    phase = draw.choice(["data", "forward", "backward", "update", "checkpoint", "checkpoint", "checkpoint"])
    if phase == "checkpoint":
        step = min(step // EVERY * EVERY + EVERY - 1, STEPS - 1)
    return Fault(draw.randrange(2), phase, step, kill, draw.choice([0, draw.uniform(0.001, 0.03)]))


def survive(run: RunDirectory, kills: int, seed: int) -> None:
    """`kills` attempts, each with a killed rank, and one to the end."""
    draw = random.Random(seed)
    for number in range(kills):
        fault = kill_at_random(run, draw)
        code, reason = supervise(run, fault)
        what = f"seed {seed}, kill {number}: {fault}: {reason}"
        if code == EXIT_DONE and fault.step == STEPS - 1:
            continue  # struck after the last of the work
        assert code == EXIT_FAULT and reason.startswith(f"rank {fault.rank} was killed by signal 9"), what
        survivors = [record for record in run.attempt(number + 1).exit_records() if record.rank != fault.rank]
        assert [record.code for record in survivors] == [EXIT_FAULT], what
    assert supervise(run)[0] == EXIT_DONE, f"seed {seed}"


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory) -> RunDirectory:
    run = killable_run(tmp_path_factory.mktemp("whole"), pictures)
    assert supervise(run)[0] == EXIT_DONE
    return run


def killable_run(folder, pictures) -> RunDirectory:
    return new_run(folder, str(pictures), f"steps={STEPS}", f"checkpoint.every_steps={EVERY}", "zero.stage=1")


@pytest.mark.parametrize("kills", [KILLS, pytest.param(100, marks=pytest.mark.soak)])
def test_ranks_killed_at_random_points_lose_nothing(kills, uninterrupted, pictures, tmp_path):
    seed = random.randrange(1 << 30)
    run = killable_run(tmp_path, pictures)
    survive(run, kills, seed)
    assert dict(recorded(run, repeats=True)) == dict(recorded(uninterrupted)), f"seed {seed}"
    ours, theirs = (read_weights(one.newest_checkpoint()) for one in (run, uninterrupted))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in theirs), f"seed {seed}"
