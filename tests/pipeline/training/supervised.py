"""The real supervisor over ranks from the pool: `run_rank`, signals, records and verdicts, without paying for imports.

A fault strikes a rank as it enters a phase of a step, or some time later: there is no other thread to strike from.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline import launch
from pipeline.run_directory import RunDirectory
from tests.ranks import PRELOAD

STAGES = {"sequence": "pipeline.training.sequence:train_all"}


class Fault(NamedTuple):
    """What happens to `rank` when it enters `phase` of `step` (from 0), `delay` seconds later."""

    rank: int
    phase: str
    step: int
    strike: Callable[[], None]
    delay: float = 0.0


def hang() -> None:
    time.sleep(600)


def end() -> None:
    os._exit(3)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("the first exception")


class PoolRank:
    """A process of the pool, as the supervisor knows its ranks."""

    def __init__(self, process: multiprocessing.Process):
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> None:
        self.process.join()

    def kill(self) -> None:
        self.process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def supervise(run: RunDirectory, *faults: Fault, environment: dict[str, str] = {}) -> tuple[int, str]:
    """The supervisor's code and reason for one attempt of `run`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    multiprocessing.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()  # not within `main`, where it would inherit that requests to stop are held
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_start_ranks", partial(start_from_pool, faults=faults))
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            code = launch.main(str(run.path))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    verdict = run.attempt(run.last_attempt()).verdict()
    assert verdict["code"] == code
    return code, verdict["reason"]


def start_from_pool(run: RunDirectory, plan: dict, *place: Any, faults: tuple[Fault, ...]) -> dict[int, PoolRank]:
    """As `launch._start_ranks`, which it stands in for."""
    context, (meeting, *_), ranks = multiprocessing.get_context("forkserver"), place, {}
    for local_rank in range(plan["ranks_per_node"]):
        variables = launch.variables_of_rank(plan, *place[:2], local_rank, place[2])
        variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        variables |= {name: value for name, value in os.environ.items() if name.startswith("VIT_COLLECTIVE")}
        rank = int(variables["RANK"])
        own = [fault for fault in faults if fault.rank == rank]
        log = meeting.attempt.log(rank)
        process = context.Process(target=_rank, args=(str(run.path), plan["stage"], variables, log, own))
        process.start()
        ranks[rank] = PoolRank(process)
    return ranks


def _rank(run_path: str, stage: str, variables: dict[str, str], log: Path, faults: list[Fault]) -> None:
    os.environ |= variables
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from pipeline.rank import run_rank

    torch.set_num_threads(1)
    lay(faults)
    run_rank(run_path, STAGES.get(stage, "pipeline.training.loop:train"))


def lay(faults: list[Fault]) -> None:
    from pipeline.progress import Progress

    enter = Progress.enter

    def strike(progress: Progress, phase: str) -> None:
        enter(progress, phase)
        for fault in faults:
            if (fault.phase, fault.step) == (phase, progress.step):
                if fault.delay:
                    threading.Timer(fault.delay, fault.strike).start()
                else:
                    fault.strike()

    Progress.enter = strike
