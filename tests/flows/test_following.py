"""What a controller makes of a cluster that restarts jobs, renames them or falls silent: a fake with a state table."""

import json
import threading
from pathlib import Path

import pytest

from cluster.job import CancelError, Job, JobState
from flows.control import following
from flows.control.following import Follower, Observation
from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED
from pipeline.run_directory import RunDirectory, read_json, write_json

FIGURES = {"perf/images_per_second": 5.0, "perf/data_wait_share": 0.0, "perf/seconds_left": 7.0, "train/loss": 2.0}
PENDING, RUNNING, ENDED, UNKNOWN = JobState.PENDING, JobState.RUNNING, JobState.ENDED, JobState.UNKNOWN


class Cluster:
    """Jobs that go through `course`: each answer is (job id, state, what happens to the run directory then)."""

    kind = "slurm"

    def __init__(self, run: RunDirectory, course: list):
        self.run, self.course, self.submitted, self.cancelled = run, course, 0, []
        self.words, self.refuses_to_cancel = "", 0

    def submit(self, request) -> Job:
        self.submitted += 1
        write_json(self.run.job_file, {"kind": "slurm", "id": "1", "key": self.run.key, "attempt": request.attempt})
        return self.find(self.run.path)

    def find(self, directory: Path) -> Job | None:
        raw = read_json(self.run.job_file)
        return Job("slurm", raw["id"], raw["key"], raw["attempt"]) if raw else None

    def state(self, job: Job) -> JobState:
        if not self.course or self.course[0][0] != job.id:
            return ENDED
        _, state, happens = self.course.pop(0)
        if happens:
            happens()
        return state

    def explain(self, job: Job) -> str:
        return self.words or f"SLURM job {job.id}: PENDING (Priority)"

    def cancel(self, job: Job, grace_seconds: float) -> None:
        if self.refuses_to_cancel:
            self.refuses_to_cancel -= 1
            raise CancelError("no answer")
        self.cancelled.append(job.id)
        (self.run.path / "stop.json").write_text("{}")
        self.course.clear()


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDirectory:
    for name in (
        "LOOK_SECONDS",
        "STATE_SECONDS",
        "CONFIRM_SECONDS",
        "OBSERVE_SECONDS",
        "CANCEL_AGAIN_SECONDS",
        "CLUSTER_LINE_SECONDS",
    ):
        monkeypatch.setattr(following, name, 0.0)
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.profile_file.write_text("kind: slurm\n")
    run.config_file.write_text("stage: pretrain\nzero: {stage: 1}\n")
    write_json(run.plan_file, {"stage": "pretrain", "nodes": 2, "ranks_per_node": 1})
    return run


def starts(run: RunDirectory, id: str, attempt: int) -> None:
    """Node 0 of a job numbers its attempt."""
    job = {"kind": "slurm", "id": id, "key": run.key, "attempt": attempt, "start": f"{id}.0"}
    write_json(run.job_file, job)
    run.attempt(attempt).make().ledger.write_text(json.dumps({"step": 3 * attempt} | FIGURES) + "\n")


def verdict(run: RunDirectory, attempt: int, code: int, reason: str) -> None:
    write_json(run.attempt(attempt).path / "exit" / "verdict.json", {"code": code, "reason": reason})


def follow(run: RunDirectory, cluster: Cluster, **events: threading.Event):
    said: list[str] = []
    seen: list[Observation] = []
    events = {"cancelled": threading.Event(), "detached": threading.Event()} | events
    follower = Follower(run, cluster, said.append, observe=seen.append, **events)
    return follower, follower.follow(), said, seen


def test_a_job_is_followed_through_a_requeue_and_a_new_job_of_another_number(run):
    def resubmits():
        verdict(run, 2, EXIT_STOPPED, "stopped on request at step 6 of 9, checkpoint complete")
        write_json(run.job_file, {"kind": "slurm", "id": "2", "key": run.key, "attempt": 2})

    def ends():
        verdict(run, 3, EXIT_DONE, "done")

    cluster = Cluster(run, [
        ("1", PENDING, None), ("1", RUNNING, None), ("1", RUNNING, lambda: starts(run, "1", 1)),
        ("1", PENDING, None), ("1", RUNNING, lambda: starts(run, "1", 2)), ("1", RUNNING, resubmits),
        ("1", ENDED, None), ("2", PENDING, None), ("2", RUNNING, lambda: starts(run, "2", 3)),
        ("2", RUNNING, ends),
    ])  # fmt: skip
    _, conclusion, said, seen = follow(run, cluster)
    assert conclusion == (EXIT_DONE, "done") and cluster.submitted == 1
    assert [line.partition(" runs as ")[0] for line in said if " runs as " in line] == [
        f"run: attempt {number}" for number in (1, 2, 3)
    ]
    assert any(line.startswith("stopped on request at step 6 of 9") and line.endswith("; going on") for line in said)
    assert {observation.job.id for observation in seen} == {"1", "2"}
    assert seen[-1].entry["step"] == 9 and seen[-1].state is ENDED


def test_no_answer_is_not_an_end(run):
    cluster = Cluster(run, [
        ("1", RUNNING, lambda: starts(run, "1", 1)), *[("1", UNKNOWN, None)] * 5, ("1", RUNNING, None),
        ("1", ENDED, None), ("1", RUNNING, lambda: verdict(run, 1, EXIT_DONE, "done")),
    ])  # fmt: skip
    _, conclusion, said, _ = follow(run, cluster)
    assert conclusion == (EXIT_DONE, "done") and cluster.submitted == 1
    assert [line for line in said if "does not answer" in line] == [
        "slurm does not answer; slurm job 1 may well go on, asking again"
    ]


def test_a_job_that_the_script_could_not_submit_again_is_submitted_by_who_follows(run, monkeypatch):
    asked = []

    def resubmit(directory, code, launcher):
        asked.append((directory, code))
        write_json(run.job_file, {"kind": "slurm", "id": "2", "key": run.key, "attempt": 1})
        return "submitted again as job 2"

    monkeypatch.setattr(following, "resubmit", resubmit)
    cluster = Cluster(run, [
        ("1", RUNNING, lambda: starts(run, "1", 1)), ("1", ENDED, None), ("1", ENDED, None),
        ("2", RUNNING, lambda: (starts(run, "2", 2), verdict(run, 2, EXIT_DONE, "done"))),
    ])  # fmt: skip
    cluster.words = "SLURM job 1: TIMEOUT"
    _, conclusion, said, _ = follow(run, cluster)
    assert conclusion == (EXIT_DONE, "done") and asked == [(run.path, EXIT_FAULT)]
    assert "submitted again as job 2" in said


def test_a_job_that_somebody_cancelled_is_not_submitted_again(run, monkeypatch):
    monkeypatch.setattr(following, "resubmit", lambda *_: pytest.fail("it was submitted again"))
    cluster = Cluster(run, [("1", RUNNING, lambda: starts(run, "1", 1))])
    cluster.words = "SLURM job 1: CANCELLED by 0"
    _, (code, reason), _, _ = follow(run, cluster)
    assert code == EXIT_FAULT and "(SLURM job 1: CANCELLED by 0)" in reason


def test_a_job_that_never_began_is_not_submitted_again_and_its_script_is_quoted(run, monkeypatch):
    monkeypatch.setattr(following, "resubmit", lambda *_: pytest.fail("it was submitted again"))
    (run.path / "submit").mkdir()
    (run.path / "submit" / "slurm-1.out").write_text(
        "module: command not found\nnot submitted again: exit code 127 does not ask for it\n\n"
    )
    cluster = Cluster(run, [("1", RUNNING, None)])
    cluster.words = "SLURM job 1: FAILED"
    _, (code, reason), _, _ = follow(run, cluster)
    assert code == EXIT_FAULT
    assert reason.startswith("slurm job 1 ended before an attempt began (SLURM job 1: FAILED): module: command not fo")


def test_a_stop_is_asked_for_until_it_is_confirmed(run):
    cancelled = threading.Event()
    cancelled.set()
    cluster = Cluster(run, [("1", PENDING, None)] * 10_000_000)
    cluster.refuses_to_cancel = 2
    _, (code, reason), said, _ = follow(run, cluster, cancelled=cancelled)
    assert code == EXIT_STOPPED and cluster.cancelled == ["1"] and "ended before an attempt began" in reason
    assert said.count("not stopped yet, asking again: no answer") == 2 and said.count("stopping") == 1


def test_a_job_that_is_left_goes_on(run):
    detached = threading.Event()
    cluster = Cluster(run, [("1", RUNNING, detached.set), ("1", RUNNING, None)])
    follower, conclusion, _, _ = follow(run, cluster, detached=detached)
    assert follower.has_left and conclusion == (EXIT_DONE, "goes on as slurm job 1") and not cluster.cancelled


def test_who_looks_on_ends_no_run(run):
    def fails(observation):
        raise ConnectionError("no API")

    cluster = Cluster(run, [("1", RUNNING, lambda: (starts(run, "1", 1), verdict(run, 1, EXIT_DONE, "done")))])
    said: list[str] = []
    events = {"cancelled": threading.Event(), "detached": threading.Event()}
    assert Follower(run, cluster, said.append, observe=fails, **events).follow() == (EXIT_DONE, "done")
    assert said.count("progress is no longer shown elsewhere: no API") == 1
