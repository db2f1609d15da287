"""Several people on one login node: jobs without root, and jobs of somebody else."""

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.job import CancelError, JobState
from tests.cluster.slurm_jobs import SLEEPS, launcher_with, reaches, request_of

pytestmark = pytest.mark.slurm
NOBODY = 65534


def as_nobody(action: Callable[[], None]) -> None:
    """Run it in a process that has given up root; it fails here where it fails there."""
    if not (child := os.fork()):
        try:
            os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
            os.environ["HOME"] = "/nonexistent"
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "see the captured output"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A run directory of nobody's; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        (run := Path(path) / "run").mkdir()
        os.chown(run, NOBODY, NOBODY)
        yield run


def test_a_job_needs_no_root_and_its_files_have_the_rights_of_the_profile(folder, slurm):
    def submit() -> None:
        launcher = launcher_with(umask="0007", nodes=2)
        job = launcher.submit(request_of(folder, ("bash", "-c", "id -u; touch result-$SLURMD_NODENAME")))
        assert launcher.find(folder) == job
        reaches(launcher, job, JobState.ENDED)
        text = launcher.log(job, 0)[0]
        assert f"{NOBODY}\n" in text, text

    as_nobody(submit)
    results = [path.stat() for path in sorted(folder.glob("result-*"))]
    assert [(status.st_uid, oct(status.st_mode & 0o777)) for status in results] == [(NOBODY, "0o660")] * 2


def test_somebody_elses_job_is_found_but_not_cancelled_and_that_is_said_at_once(folder, slurm):
    launcher = launcher_with()
    job = launcher.submit(request_of(folder, SLEEPS))
    reaches(launcher, job, JobState.RUNNING)

    def cancel() -> None:
        mine = launcher_with()
        assert mine.find(folder) == job and mine.state(job) is JobState.RUNNING
        with pytest.raises(CancelError, match=f"SLURM job {job.id}: .*permission denied.*; its owner can cancel it"):
            mine.cancel(job, grace_seconds=60)

    as_nobody(cancel)
    assert not (folder / "stop.json").exists()
    assert launcher.state(job) is JobState.RUNNING
