"""Who works on a run that no controller started: found, stopped and not started twice."""

import json
import signal
import subprocess
import sys
import time

import pytest

from cluster.job import JobState
from cluster.local import LocalLauncher
from flows.command_line.runs import run_state, stop_command
from pipeline.budget import rank_hours
from pipeline.errors import InputError
from pipeline.rank import _names_attempt
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.supervision.liveness import beat_for_all, begin_by_hand, running_elsewhere

BEGINS = """
import sys
from pipeline.supervision.liveness import begin_by_hand
from pipeline.run_directory import RunDirectory
begin_by_hand(RunDirectory(sys.argv[1]), "here")
print(flush=True)
input()
"""


@pytest.fixture
def begun(tmp_path):
    """A process that works on the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGINS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_an_attempt_begun_by_hand_is_a_job_of_this_machine_that_is_not_begun_twice(begun, tmp_path):
    run, launcher = RunDirectory(tmp_path), LocalLauncher()
    job = launcher.find(run.path)
    assert (launcher.state(job), job.attempt) == (JobState.RUNNING, 1)
    with pytest.raises(InputError, match=rf"attempt 1 runs as process {begun.pid}; stop it by `vit stop {tmp_path}`"):
        begin_by_hand(run)
    launcher.cancel(job, 10)
    assert begun.wait() == -signal.SIGTERM and launcher.state(job) is JobState.ENDED
    assert [begin_by_hand(run).number for _ in range(2)] == [2, 3]  # this process is done with the one before


def test_peers_take_no_attempt_of_a_meeting_that_is_over(begun, tmp_path):
    job = read_json(RunDirectory(tmp_path).job_file)
    assert _names_attempt(job, "here") and not _names_attempt(job, "there") and not _names_attempt({}, "here")
    begun.kill()
    begun.wait()
    assert not _names_attempt(job, "here") and _names_attempt(job | {"host": "else"}, "here")


def test_rank_0_beats_for_all_ranks_where_no_supervisor_does(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.supervision.liveness.BEAT_SECONDS", 0.02)
    attempt, started = RunDirectory(tmp_path).attempt(1).make(), time.time()
    beat_for_all(attempt, 4)
    while (hours := rank_hours(attempt)) == 0:
        assert time.time() - started < 30
    assert hours <= 4 * (time.time() - started) / 3600


def test_a_run_is_elsewhere_only_while_it_is_heard_of_from_there(tmp_path):
    run = RunDirectory(tmp_path)
    assert running_elsewhere(run) is None
    beat_for_all(run.attempt(1).make(), 1)
    assert running_elsewhere(run) is None  # it is here
    node = run.attempt(1).path / "heartbeat" / "node-000"
    node.write_text(json.dumps(read_json(node) | {"host": "else"}))
    assert running_elsewhere(run).startswith("attempt 1 runs on else as process ")
    run.config_file.touch()
    write_json(run.job_file, {"kind": "by hand", "id": "starting", "key": run.key, "attempt": 1})
    assert run_state(run, LocalLauncher()) == "running"
    with pytest.raises(InputError, match=f"stop it there by `vit stop {run.path}`"):
        stop_command(str(run.path), str(tmp_path), print)


def test_ranks_that_another_launcher_started_conclude_themselves(tmp_path):
    attempt = RunDirectory(tmp_path).attempt(1).make()
    assert attempt.verdict() is None
    write_json(attempt.exit_file(0), {"rank": 0, "code": 75, "reason": "stopped on request at step 3 of 9"})
    assert attempt.verdict() == {"code": 75, "reason": "stopped on request at step 3 of 9"}
    write_json(attempt.exit_file(1), {"rank": 1, "code": 1, "reason": "ValueError: x"})
    assert attempt.verdict() == {"code": 1, "reason": "rank 1: ValueError: x"}
