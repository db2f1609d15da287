"""Jobs on this machine: submitted once, found again, stopped with a grace."""

import os
import sys
import time
from pathlib import Path

import pytest

from cluster.job import CancelError, Job, JobRequest, JobState
from cluster.local import LocalLauncher
from cluster.profile import LocalProfile, resolved_profile
from tests.cluster.test_slurm_users import as_nobody

LISTENS = "import signal; signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]); "
SLEEPS = LISTENS + "import time; print('up', flush=True); time.sleep(60)"
REFUSES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def request_of(directory: Path, code: str, attempt: int = 1) -> JobRequest:
    return JobRequest(
        "key", directory, (sys.executable, "-c", code), {"GREETING": "hello"}, attempt, directory / "job.log"
    )


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def launcher():
    return LocalLauncher()


def test_a_living_job_is_found_and_not_submitted_twice(tmp_path, launcher):
    job = launcher.submit(request_of(tmp_path, SLEEPS))
    again = LocalLauncher().submit(request_of(tmp_path, SLEEPS, attempt=2))
    assert again == job == launcher.find(tmp_path) and launcher.state(job) is JobState.RUNNING
    launcher.cancel(job, 5)
    wait_until(lambda: launcher.state(job) is JobState.ENDED)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_job_of_somebody_else_is_not_stopped_and_its_owner_is_named(tmp_path, launcher):
    job = launcher.submit(request_of(tmp_path, SLEEPS))

    def cancel() -> None:
        with pytest.raises(CancelError, match="process [0-9]+ is of root, who can stop it"):
            LocalLauncher().cancel(job, 5)

    as_nobody(cancel)
    assert launcher.state(job) is JobState.RUNNING
    launcher.cancel(job, 5)


def test_a_job_that_ended_is_followed_by_a_new_one(tmp_path, launcher):
    first = launcher.submit(request_of(tmp_path, "pass"))
    wait_until(lambda: launcher.state(first) is JobState.ENDED)
    second = launcher.submit(request_of(tmp_path, "import os; print(os.environ['GREETING'])", attempt=2))
    assert second.attempt == 2 and second != first
    wait_until(lambda: launcher.state(second) is JobState.ENDED)
    assert launcher.log(tmp_path / "job.log", 0) == ("hello\n", 6)
    assert launcher.log(tmp_path / "job.log", 6) == ("", 6)


def test_a_job_that_refuses_to_stop_is_ended_after_its_grace(tmp_path, launcher):
    job = launcher.submit(request_of(tmp_path, REFUSES))
    wait_until(lambda: launcher.log(tmp_path / "job.log", 0)[0])
    launcher.cancel(job, grace_seconds=0.3)
    wait_until(lambda: launcher.state(job) is JobState.ENDED)


def test_a_stop_that_comes_before_the_job_can_answer_waits_for_it(tmp_path, launcher):
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('stopped', flush=True))); "
    job = launcher.submit(request_of(tmp_path, code + "import time; time.sleep(0.5); " + LISTENS))
    launcher.cancel(job, 30)  # it is starting
    wait_until(lambda: launcher.state(job) is JobState.ENDED)
    assert launcher.log(tmp_path / "job.log", 0)[0] == "stopped\n"


def test_a_recycled_pid_is_not_taken_for_the_job(launcher):
    assert launcher.state(Job("local", "1:12.00", "key", 1)) is JobState.ENDED
    assert launcher.state(Job("local", "starting", "key", 1)) is JobState.ENDED


def test_a_directory_without_a_job_has_none(tmp_path, launcher):
    assert launcher.find(tmp_path) is None


def test_a_profile_takes_one_rank_per_accelerator_and_two_without(monkeypatch):
    monkeypatch.setattr("cluster.profile.accelerators_here", lambda: 4)
    assert resolved_profile(LocalProfile(kind="local")).ranks_per_node == 4
    assert resolved_profile(LocalProfile(kind="local", ranks_per_node=2)).accelerators_per_node == 2
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    assert resolved_profile(LocalProfile(kind="local")).loader_workers == 16
    monkeypatch.setattr("cluster.profile.accelerators_here", lambda: 0)
    resolved = resolved_profile(LocalProfile(kind="local"))
    assert (resolved.ranks_per_node, resolved.accelerators_per_node) == (2, 0) and resolved.loader_workers is not None
