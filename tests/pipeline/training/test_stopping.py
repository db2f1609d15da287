"""A request to stop, by either signal and whoever gets it: all ranks save the same step and end with 75."""

import multiprocessing
import os
import signal
from functools import partial

import pytest

from cluster.local import LocalLauncher
from flows import profiles
from flows.control.following import conclude
from flows.control.submission import submit
from flows.requests.training import sequence_run
from pipeline.errors import EXIT_DONE, EXIT_STOPPED
from pipeline.preparation.resume import change_run
from tests.pipeline.training.runs import STEPS, new_run
from tests.pipeline.training.supervised import Fault, supervise

pytestmark = pytest.mark.slow


def signal_rank(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_with_helpers(number: int, *others: int) -> None:
    """This rank, the workers of its loader, and `others`."""
    for pid in (*(worker.pid for worker in multiprocessing.active_children()), os.getpid(), *others):
        os.kill(pid, number)


def requests_to_stop(target: str, number: int) -> list[Fault]:
    match target:
        case "supervisor":
            return [Fault(0, "forward", 3, partial(os.kill, os.getpid(), number))]
        case "rank":
            return [Fault(1, "forward", 3, partial(signal_rank, number))]
        case "group":
            return [
                Fault(0, "forward", 3, partial(signal_with_helpers, number, os.getpid())),
                Fault(1, "backward", 3, partial(signal_with_helpers, number)),
            ]


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("group", signal.SIGTERM),
        ("group", signal.SIGUSR1),
        ("supervisor", signal.SIGUSR1),
        ("rank", signal.SIGTERM),
        ("rank", signal.SIGUSR1),
    ],
)
def test_all_ranks_save_the_same_step_and_end_with_75(target, number, pictures, tmp_path):
    run = new_run(tmp_path, str(pictures), "checkpoint.every_steps=1000")
    code, reason = supervise(run, *requests_to_stop(target, number))
    step = run.newest_checkpoint().step
    assert (code, reason) == (EXIT_STOPPED, f"stopped on request at step {step} of {STEPS}, checkpoint complete")
    assert [(record.code, record.step) for record in run.attempt(1).exit_records()] == [(EXIT_STOPPED, step - 1)] * 2
    assert 4 <= step < STEPS


def test_a_stop_while_the_supervisor_and_its_ranks_start_is_heard_by_all(pictures, tmp_path):
    run, launcher = new_run(tmp_path, str(pictures)), LocalLauncher()
    job = submit(run, launcher)
    launcher.cancel(job, 120)
    assert conclude(run, job) == (EXIT_STOPPED, "stopped on request before the first step")
    assert [record.code for record in run.attempt(1).exit_records()] == [EXIT_STOPPED] * 2


@pytest.mark.parametrize("phase", ["data", "model"])
def test_a_stop_of_one_rank_before_the_first_step_stops_all_before_it(phase, pictures, tmp_path):
    run = new_run(tmp_path, str(pictures))
    assert supervise(run, Fault(1, phase, -1, partial(signal_rank, signal.SIGTERM))) == (
        EXIT_STOPPED, "stopped on request before the first step",
    )  # fmt: skip
    assert [(record.code, record.step) for record in run.attempt(1).exit_records()] == [(EXIT_STOPPED, -1)] * 2


def test_a_sequence_stops_in_the_run_it_makes_and_goes_on_with_it(pictures, tmp_path):
    runs = [new_run(tmp_path / name, str(pictures), "steps=6") for name in ("one", "two")]
    sequence = sequence_run(runs, profile="local", overrides=["profile.ranks_per_node=2"], home=tmp_path)
    assert supervise(sequence, Fault(1, "forward", 3, partial(signal_rank, signal.SIGTERM)))[0] == EXIT_STOPPED
    assert 4 <= runs[0].newest_checkpoint().step < 6 and not runs[1].attempts.exists()
    assert supervise(sequence)[0] == EXIT_DONE
    assert all(run.newest_checkpoint().step == 6 for run in runs)


def test_a_budget_stops_with_a_checkpoint_and_a_larger_one_goes_on(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures), "budget_gpu_hours=0.0001")  # spent within the first step
    code, reason = supervise(run)
    assert code == EXIT_STOPPED and reason.startswith("budget_gpu_hours 0.0001 is spent ("), reason
    assert reason.endswith(f": stopped at step 1 of {STEPS}, checkpoint complete")
    assert run.newest_checkpoint().step == 1
    profile, placement = profiles.changed_profile(run.profile_file, [])
    change_run(run, ["budget_gpu_hours=10"], profile, placement)
    assert supervise(run)[0] == EXIT_DONE
