"""Two supervisors on this machine, as two nodes of a cluster would run them: `VIT_START` and SLURM's variables."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from flows import profiles
from pipeline.preparation.placement import Placement
from pipeline.preparation.resume import change_run
from pipeline.run_directory import RunDirectory
from tests.pipeline.training.runs import new_run

DEADLINE_SECONDS = 150


def run_for_nodes(folder: Path, data: Path, *settings: str, nodes: int = 2) -> RunDirectory:
    """A tiny run of one rank per node, that may start on one node or two, planned for `nodes`."""
    run = new_run(folder, str(data), *settings, ranks=1)
    profile, placement = profiles.changed_profile(run.profile_file, [])
    change_run(run, [], profile, placement_on(placement, nodes))
    return run


def placement_on(placement: Placement, nodes: int) -> Placement:
    return Placement("slurm", nodes, placement.ranks_per_node, placement.loader_workers, 0, nodes_range=(1, 2))


def environment_of(start: str, node: int, nodes: int, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "VIT_ATTEMPT"))}
    of_slurm = {"SLURM_NODEID": str(node), "SLURM_JOB_NUM_NODES": str(nodes), "VIT_START": start}
    return clean | of_slurm | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": "localhost"} | more


class Nodes:
    """The supervisors of one start. To be left by `with`, which ends what still runs."""

    def __init__(
        self, run: RunDirectory, start: str, nodes: int = 2, *, only: int | None = None,
        module: str = "pipeline.launch", **more: str,
    ):  # fmt: skip
        """`only` one of the nodes. `module`: what runs; `more`: environment."""
        self.run, self.start = run, start
        numbers = range(nodes) if only is None else [only]
        self.supervisors = [
            subprocess.Popen(
                [sys.executable, "-m", module, str(run.path)],
                env=environment_of(start, number, nodes, **more), stderr=subprocess.PIPE, text=True,
            )
            for number in numbers
        ]  # fmt: skip

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *error: object) -> None:
        for supervisor in self.supervisors:
            supervisor.kill()
            supervisor.communicate()

    def wait(self, seconds: float = DEADLINE_SECONDS) -> list[int]:
        deadline = time.monotonic() + seconds
        return [supervisor.wait(max(0.1, deadline - time.monotonic())) for supervisor in self.supervisors]

    def tree(self, number: int) -> list[psutil.Process]:
        """The supervisor of a node, its ranks, and their helpers."""
        supervisor = psutil.Process(self.supervisors[number].pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def verdict(self) -> tuple[int, str]:
        """What `python -m pipeline.verdict` says of this start: its code, which is its exit code too, and its line."""
        command = [sys.executable, "-m", "pipeline.verdict", str(self.run.path)]
        done = subprocess.run(command, env=environment_of(self.start, 0, 2), capture_output=True, text=True, timeout=60)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout.rstrip("\n")


def until(true: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.05)


def has_committed(run: RunDirectory, step: int) -> bool:
    newest = run.newest_checkpoint()
    return newest is not None and newest.step >= step
