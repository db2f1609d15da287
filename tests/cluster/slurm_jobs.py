"""Jobs for tests on a real SLURM: a request, a command that listens, and waiting for what it says."""

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.job import Job, JobRequest, JobState
from cluster.slurm.launcher import SlurmLauncher
from cluster.slurm.profile import SlurmProfile
from tests.cluster.slurm import wait_until

SLEEPS = ("bash", "-c", "echo listening; sleep 300")

# Writes each start and waits to be stopped, with code 75; ends well once the file `finish` is there.
LISTENS = (sys.executable, "-c", """
import os, pathlib, signal, sys, time
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: sys.exit(75))
with open("starts", "a") as starts:
    starts.write(os.environ["VIT_START"] + " " + os.environ["SLURMD_NODENAME"] + "\\n")
print("listening", flush=True)
while not pathlib.Path("finish").exists():
    time.sleep(0.1)
""")  # fmt: skip


def launcher_with(**fields) -> SlurmLauncher:
    given = {"kind": "slurm", "nodes": 1, "accelerators_per_node": 0, "cpus_per_task": 1, "time": "10"} | fields
    return SlurmLauncher(SlurmProfile.model_validate(given), python=sys.executable, poll_seconds=0)


def request_of(directory: Path, command: Sequence[str], **fields) -> JobRequest:
    directory.mkdir(parents=True, exist_ok=True)
    given = {"key": "key", "environment": {}, "attempt": 0, "log": directory / "unused"} | fields
    return JobRequest(directory=directory, command=tuple(command), **given)


def reaches(launcher: SlurmLauncher, job: Job, state: JobState, seconds: float = 40.0) -> None:
    wait_until(lambda: launcher.state(job) is state, seconds, f"{state} ({launcher.explain(job)})")


def logs(launcher: SlurmLauncher, job: Job, text: str, seconds: float = 40.0) -> None:
    wait_until(lambda: text in launcher.log(job, 0)[0], seconds, f"{text!r} in the log")


def starts(directory: Path) -> list[list[str]]:
    """Id and node of every start of a command that listens."""
    path = directory / "starts"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def commands_that_say(folder: Path, **scripts: str) -> None:
    """Stand-ins for SLURM's commands, each a line of bash, to be put on PATH; `folder/asked` lists who was asked."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in {"sacct": ":", **scripts}.items():
        (folder / name).write_text(f'#!/bin/bash\necho {name} >>"{folder}/asked"\n{script}\n')
        (folder / name).chmod(0o755)
