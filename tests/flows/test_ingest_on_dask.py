"""The ingestion flow with a Dask cluster as its task runner, on a real Prefect server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import ingest
from tests.pipeline.pictures import class_folders, files_of

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
from pathlib import Path
from flows.services.temporary_server import prefect_server
if __name__ == "__main__":
    home, source, dest, options = Path(sys.argv[1]), *sys.argv[2:4], json.loads(sys.argv[4])
    with prefect_server(home):
        from flows.ingest import ingest
        from prefect.client.orchestration import get_client
        state = ingest(source, dest, ["samples_per_shard=9"], **options, return_state=True)
        with get_client(sync_client=True) as client:
            tasks = [(run.name, run.state_name) for run in client.read_task_runs()]
        print(json.dumps({"state": state.name, "message": state.message, "tasks": tasks}), flush=True)
    os._exit(0)  # Prefect would wait for its server, which has ended, to take the last lines of the log
"""


def flow_run(home, source, dest, options):
    home.mkdir(exist_ok=True)
    script = home / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, home, source, dest, json.dumps(options)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_flow_run_on_dask_makes_the_same_bytes_in_tasks_that_prefect_shows(home, tmp_path):
    source = class_folders(tmp_path / "source")
    local = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    options = {"dask_cluster": "distributed.LocalCluster", "dask_options": local}
    ended = flow_run(home, source, tmp_path / "there", options)
    assert ended["state"] == "Completed" and "6 shards written" in ended["message"], ended
    shards = [name for name, _ in ended["tasks"] if name.startswith("make shards")]  # one more is the flow in the flow
    assert len(shards) == 6 and {state for _, state in ended["tasks"]} == {"Completed"}
    ingest(str(source), tmp_path / "here", IngestConfig(samples_per_shard=9))
    there, here = files_of(tmp_path / "there"), files_of(tmp_path / "here")
    assert {name: there[name] for name in here if name != ".ingest.jsonl"} == {
        name: content for name, content in here.items() if name != ".ingest.jsonl"
    }


@pytest.mark.slow
def test_a_cluster_that_cannot_be_had_is_refused_in_a_line(home, tmp_path):
    source = class_folders(tmp_path / "source")
    ended = flow_run(home, source, tmp_path / "there", {"dask_cluster": "dask_nowhere.SLURMCluster"})
    assert ended["state"] == "Failed" and "needs dask_nowhere; install dask_nowhere" in ended["message"], ended
