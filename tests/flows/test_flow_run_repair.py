"""Flow runs whose process is gone, settled against a Prefect that only remembers states."""

import contextlib
import os
import uuid
from types import SimpleNamespace

import pytest
from prefect.states import Running

from flows.orchestration import flow_run_repair
from flows.orchestration.flow_run_repair import repair_flow_runs
from flows.orchestration.standing import standing
from flows.orchestration.watchers import WatcherNote
from pipeline.run_directory import RunDirectory, read_json, write_atomic, write_json
from tests.cluster.slurm_jobs import commands_that_say


class Prefect:
    """Flow runs of a deployment by id, each with its newest state."""

    def __init__(self):
        self.flow_runs = {}

    def flow_run(self) -> str:
        id, state = str(uuid.uuid4()), Running()
        self.flow_runs[id] = SimpleNamespace(
            id=id, name=f"flow-{len(self.flow_runs)}", state=state, state_type=state.type, run_count=1,
            deployment_id="d",
        )  # fmt: skip
        return id

    def read_flow_run(self, id):
        return self.flow_runs[id]

    def set_flow_run_state(self, id, state, force):
        self.flow_runs[id].state, self.flow_runs[id].state_type = state, state.type


@pytest.fixture
def prefect(monkeypatch) -> Prefect:
    prefect = Prefect()
    monkeypatch.setattr(flow_run_repair, "impatient_client", lambda seconds: contextlib.nullcontext(prefect))
    return prefect


def watching(home, id: str, run: RunDirectory, *, lives: bool) -> WatcherNote:
    note = WatcherNote(home, id)
    note.begin(single=True)
    note.add(run)
    if not lives:
        write_json(note.path, read_json(note.path) | {"process": "999999:1.00"})
    return note


@pytest.fixture
def run(home, tmp_path, monkeypatch) -> RunDirectory:
    """A run whose job lives on a cluster."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    commands_that_say(tmp_path, squeue="echo '7|RUNNING|None|0:01|n1|now|vit-a|run /a'")
    run = RunDirectory(home / "runs" / "a")
    run.path.mkdir(parents=True)
    write_atomic(run.config_file, "stage: pretrain\n")
    write_atomic(run.profile_file, "kind: slurm\n")
    write_json(run.job_file, {"kind": "slurm", "id": "7", "key": run.key, "attempt": 1})
    return run


def test_a_run_that_a_living_flow_run_watches_is_not_handed_to_a_second_one(home, prefect, run):
    dead = watching(home, prefect.flow_run(), run, lives=False)
    said: list[str] = []
    assert repair_flow_runs(home, {}, said.append) == 0
    assert prefect.flow_runs[dead.id].state.name == "AwaitingRetry" and dead.path.exists()

    other = watching(home, prefect.flow_run(), run, lives=True)
    prefect.set_flow_run_state(dead.id, Running(), force=True)
    assert repair_flow_runs(home, {}, said.append) == 0
    assert prefect.flow_runs[dead.id].state.name == "Crashed" and not dead.path.exists()
    assert said[-1].endswith("its process is gone, and another flow run watches a")
    assert other.path.exists() and prefect.flow_runs[other.id].state.name == "Running"


def test_a_job_that_was_left_to_itself_is_named_once_and_again_when_its_watcher_left_it(home, prefect, run):
    def named() -> list[str]:
        said: list[str] = []
        assert repair_flow_runs(home, {run: standing(run)}, said.append) == 0
        return said

    assert named() == [f"a: slurm job 7 is running and no flow watches it; watch it with: vit resume {run.path}"]
    assert named() == []
    note = watching(home, prefect.flow_run(), run, lives=True)
    assert named() == []
    note.remove()
    assert len(named()) == 1
