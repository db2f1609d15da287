"""`vit reconcile` without Prefect: run directories against MLflow and the processes of this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from flows.command_line.runs import runs_command
from flows.home import tracking_uri
from flows.orchestration import reconciliation
from flows.orchestration.reconciliation import reconcile_home
from flows.orchestration.standing import RESTART_SECONDS
from flows.orchestration.watchers import WatcherNote, watcher_notes
from pipeline.registry.tracking import KEY_TAG, connect
from pipeline.run_directory import RunDirectory, read_json, write_atomic, write_json
from tests.cluster.slurm_jobs import commands_that_say

WITHOUT_PREFECT = "no Prefect API answers: its flow runs were left as they are"


def ended_run(home, name: str, verdict: tuple[int, str] | None) -> RunDirectory:
    """A run whose job is gone, with twenty steps that nobody forwarded."""
    run = RunDirectory(home / "runs" / name)
    run.path.mkdir(parents=True)
    write_json(run.plan_file, {"stage": "pretrain"})
    write_atomic(run.config_file, "stage: pretrain\nzero: {stage: 1}\n")
    write_atomic(run.profile_file, "kind: local\n")
    write_json(run.job_file, {"kind": "local", "id": "999999:1.00", "key": run.key, "attempt": 1})
    attempt = run.attempt(1).make()
    lines = [{"step": step, "time": time.time(), "train/loss": 1.0 / step} for step in range(1, 21)]
    attempt.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if verdict:
        attempt.write_verdict(*verdict)
    return run


def reconciled(home) -> tuple[int, list[str]]:
    said: list[str] = []
    return reconcile_home(home, said.append), said


def mirrored_runs(home):
    client = connect(tracking_uri(home))
    experiment = client.get_experiment_by_name("vit/pretrain")
    return {run.data.tags[KEY_TAG]: run for run in client.search_runs([experiment.experiment_id])}


def test_ledgers_are_forwarded_statuses_set_and_the_second_time_nothing_is_done(home):
    stopped, lost = ended_run(home, "stopped", (75, "stopped on request")), ended_run(home, "it's `lost\" 50%", None)
    code, said = reconciled(home)
    assert code == 0 and len(said) == 5 and said[-1] == WITHOUT_PREFECT
    assert "stopped: its ledger was forwarded to MLflow, up to step 20" in said
    assert f"{lost.path.name}: MLflow held it for running, and it is failed" in said
    found = mirrored_runs(home)
    assert found[stopped.key].info.status == "KILLED" and found[lost.key].info.status == "FAILED"
    assert found[lost.key].data.metrics["train/loss"] == pytest.approx(1 / 20)
    assert reconciled(home) == (0, [WITHOUT_PREFECT])

    connect(tracking_uri(home)).update_run(found[stopped.key].info.run_id, status="RUNNING")
    assert reconciled(home) == (0, ["stopped: MLflow held it for running, and it is stopped", WITHOUT_PREFECT])
    assert mirrored_runs(home)[stopped.key].info.status == "KILLED"


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_repaired(home):
    broken, sound = ended_run(home, "broken", None), ended_run(home, "sound", (75, "stopped on request"))
    broken.job_file.write_text("{")
    code, said = reconciled(home)
    assert code == 1 and any(line.startswith("broken: could not be looked at") for line in said)
    assert mirrored_runs(home)[sound.key].info.status == "KILLED"


def test_a_run_with_a_damaged_file_is_listed_as_unreadable_beside_the_others(home):
    ended_run(home, "sound", (75, "stopped on request"))
    for name in ("config", "job", "plan", "profile", "result"):
        run = ended_run(home, f"cut-{name}", (75, "stopped on request"))
        damaged = next(run.path.glob(f"{name}.*"), run.result_file)
        damaged.write_text('{"a')
    said: list[str] = []
    assert runs_command(str(home), said.append) == 1
    assert sum(line.split()[:2] == ["sound", "stopped"] for line in said) == 1 and len(said) == 6
    lines = {line.split()[0]: line for line in said}
    for name in ("job", "profile", "result"):
        assert f"unreadable {home}/runs/cut-{name}/{name}." in lines[f"cut-{name}"]
    code, said = reconciled(home)
    assert code == 1 and {line.split(":")[0] for line in said if "could not be looked at" in line} >= {
        "cut-job", "cut-plan", "cut-profile"
    }  # fmt: skip
    assert any(line.startswith("sound: its ledger was forwarded") for line in said)


def test_runs_that_may_start_again_are_given_the_same_moments_and_others_none(home, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(reconciliation, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    commands_that_say(tmp_path, squeue="exit 0")
    for number in range(3):
        on_cluster(ended_run(home, f"failed-{number}", (1, "out of memory")))
    reconciled(home)
    assert slept == []
    for number in range(3):
        on_cluster(ended_run(home, f"faulty-{number}", (76, "node 1 was lost")))
    reconciled(home)
    assert slept == [RESTART_SECONDS]


def on_cluster(run: RunDirectory) -> None:
    write_atomic(run.profile_file, "kind: slurm\n")
    write_json(run.job_file, {"kind": "slurm", "id": "7", "key": run.key, "attempt": 1, "start": "7.0"})


def test_a_job_file_that_names_no_process_names_the_one_that_works(home):
    run = ended_run(home, "worked", None)
    program = [sys.executable, "-c", "import time; time.sleep(600)", str(run.path)]
    with subprocess.Popen(program) as working:
        try:
            beat = {"time": time.time(), "started": time.time(), "host": socket.gethostname(), "pid": working.pid}
            write_json(run.attempt(1).path / "heartbeat" / "node-000", beat)
            _, said = reconciled(home)
            assert f"worked: job.json named no living process; attempt 1 runs as {working.pid}" in said
            assert read_json(run.job_file)["id"].startswith(f"{working.pid}:")
            assert not any("job.json" in line for line in reconciled(home)[1])
        finally:
            working.kill()


def test_a_note_lives_as_long_as_its_process_and_keeps_its_runs(home, monkeypatch):
    run, note = ended_run(home, "noted", None), WatcherNote(home, "f0")
    assert not note.lives() and note.runs() == []
    note.begin(single=True)
    note.add(run)
    assert note.lives() and [each.path for each in note.runs()] == [run.path]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        theirs = f"{other.pid}:{psutil.Process(other.pid).create_time():.2f}"
        write_json(note.path, read_json(note.path) | {"process": theirs})
        assert note.lives()
        other.kill()
    assert not note.lives()
    write_json(note.path, read_json(note.path) | {"host": "elsewhere"})
    assert note.lives()
    os.utime(note.path, (time.time() - 100, time.time() - 100))
    assert not note.lives()
    note.begin(single=True)
    assert note.lives() and [each.path for each in WatcherNote(home, "f0").runs()] == [run.path]
    assert [each.id for each in watcher_notes(home)] == ["f0"]
    note.remove()
    assert list(watcher_notes(home)) == []
