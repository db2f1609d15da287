"""MLflow that goes away, or was never there: no step is lost, none is doubled, and a run has one MLflow run."""

import json
import time
from types import SimpleNamespace

import pytest

from flows.control import forwarding
from flows.services.processes import end_processes, stack_processes
from flows.services.servers import HOST, answers, start_mlflow_server
from pipeline.errors import EXIT_DONE, EXIT_STOPPED
from pipeline.ports import free_port
from pipeline.registry.tracking import KEY_TAG, connect
from pipeline.run_directory import RunDirectory, write_atomic, write_json

STEPS = 120  # in three parts: before the outage, during it, and in a second attempt


@pytest.fixture
def server(tmp_path):
    """A real MLflow server that can be started and stopped on its port; it ends with the test."""
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    uri = f"http://{HOST}:{port}"

    def start() -> None:
        start_mlflow_server(home, port)
        deadline = time.monotonic() + 120
        while not answers(f"{uri}/health"):
            assert time.monotonic() < deadline, "the MLflow server did not start"
            time.sleep(0.1)

    def stop() -> None:
        end_processes(lambda: stack_processes(home))

    yield SimpleNamespace(home=home, uri=uri, start=start, stop=stop)
    stop()


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    write_json(run.plan_file, {"stage": "pretrain"})
    write_atomic(run.config_file, "stage: pretrain\nzero: {stage: 1}\n")
    return run


def write_steps(run: RunDirectory, attempt: int, steps: range, value: float) -> None:
    with open(run.attempt(attempt).make().ledger, "a") as ledger:
        for step in steps:
            line = {"step": step, "time": time.time(), "train/loss": value + step, "perf/step_seconds": 0.1}
            ledger.write(json.dumps(line) + "\n")


def wait_until(holds, what: str) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.slow
def test_an_outage_and_another_attempt_lose_and_double_nothing(server, run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(forwarding, "FORWARD_SECONDS", 0.2)
    said: list[str] = []
    forwarder = forwarding.Forwarder(run, server.home, said.append)
    write_steps(run, 1, range(1, 21), 0.0)
    wait_until(lambda: said, "that MLflow cannot be written was not said")  # it was never there until now
    server.start()
    wait_until(run.path.joinpath("forwarded.json").exists, "nothing was forwarded")
    server.stop()
    began = time.monotonic()
    write_steps(run, 1, range(21, 81), 0.0)
    time.sleep(1.0)
    assert forwarder.thread.is_alive() and time.monotonic() - began < 5
    forwarder.finish(EXIT_STOPPED, {})  # the controller ends during the outage, and no exception with it
    assert len(said) == 1 and "the ledger keeps everything" in said[0]

    server.start()
    write_steps(run, 2, range(71, STEPS + 1), 0.0)  # went on from a checkpoint at step 70
    again = forwarding.Forwarder(run, server.home, said.append)
    again.finish(EXIT_DONE, {"stage": "pretrain"})
    client = connect(server.uri)
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "vit/pretrain"]
    (mirrored,) = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{run.key}'")
    assert mirrored.info.status == "FINISHED" and mirrored.data.params["zero.stage"] == "1"
    for metric in ("train/loss", "perf/step_seconds"):
        history = client.get_metric_history(mirrored.info.run_id, metric)
        assert sorted(point.step for point in history) == list(range(1, STEPS + 1))
    assert len(said) == 1
