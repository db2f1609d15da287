"""The launcher on a real SLURM, with shell commands as jobs: no double submission, no lost job, no false end."""

import json
import sys
from pathlib import Path

import pytest

from cluster.job import JobRequest, JobState
from cluster.slurm import SlurmLauncher
from cluster.slurm_profile import SlurmProfile
from tests.cluster.slurm import wait_until

pytestmark = pytest.mark.slurm
SLEEPS = "echo up; sleep 300"


def launcher_with(**fields) -> SlurmLauncher:
    given = {"kind": "slurm", "nodes": 1, "accelerators_per_node": 0, "cpus_per_task": 1, "time": "10"} | fields
    return SlurmLauncher(SlurmProfile.model_validate(given), python=sys.executable)


def request_of(directory: Path, command: str, **fields) -> JobRequest:
    directory.mkdir(parents=True, exist_ok=True)
    given = {"key": "key", "environment": {}, "attempt": 0, "log": directory / "unused"} | fields
    return JobRequest(directory=directory, command=("bash", "-c", command), **given)


def reaches(launcher, job, state: JobState, seconds: float = 40.0) -> None:
    wait_until(lambda: launcher.state(job) is state, seconds, f"{state} of {launcher.explain(job)}")


def logs(launcher, job, text: str, seconds: float = 40.0) -> None:
    wait_until(lambda: text in launcher.log(job, 0)[0], seconds, f"{text!r} in the log")


def test_a_job_that_lives_is_found_and_not_submitted_twice(tmp_path, slurm):
    launcher = launcher_with()
    job = launcher.submit(request_of(tmp_path, SLEEPS))
    assert launcher_with().submit(request_of(tmp_path, SLEEPS)) == job == launcher.find(tmp_path)
    assert slurm.command("squeue", "-h", "-o", "%A").split() == [job.id]
    assert json.loads((tmp_path / "job.json").read_text())["id"] == job.id
    logs(launcher, job, "up")
    assert launcher.state(job) is JobState.RUNNING and "RUNNING, on node1" in launcher.explain(job)
