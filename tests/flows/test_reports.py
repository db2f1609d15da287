"""Reports where people look: written by whoever follows, logged to MLflow, shown by Prefect."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.control.forwarding import Forwarder
from flows.control.run_reports import write_run_reports
from flows.lifecycle import Lifecycle
from flows.lifecycle_report import lifecycle_folder, publish
from flows.quickstart import NAME, _with_baselines, baseline_rows
from flows.requests.lifecycle import LifecycleRequest
from pipeline.config.stages import SequenceConfig
from pipeline.errors import EXIT_DONE, InputError
from pipeline.preparation.training import dump_config
from pipeline.registry.tracking import connect, find_mirrored_run
from pipeline.report.record import Record, read_record
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.shards.index import read_index
from tests.pipeline.pages import Page
from tests.pipeline.registration.conftest import empty_store, store  # noqa: F401
from tests.pipeline.report.old_run import copied_home, trained


def test_the_end_of_a_training_leaves_a_report_that_mlflow_has_too(store, tmp_path):  # noqa: F811
    run, uri = trained(copied_home(tmp_path / "old")), f"sqlite:///{store / 'mlflow.db'}"
    os.environ["MLFLOW_TRACKING_URI"] = uri
    (run.path / "forwarded.json").unlink()
    said: list[str] = []
    Forwarder(run, store, said.append).finish(EXIT_DONE, read_json(run.result_file))
    assert (run.path / "report.html").is_file() and said == []
    _, run_id = find_mirrored_run(run, uri)
    assert "report.html" in {artifact.path for artifact in connect(uri).list_artifacts(run_id)}


def test_each_training_of_a_sequence_has_its_report(tmp_path):
    run = trained(copied_home(tmp_path))
    sequence = RunDirectory(tmp_path / "sequence")
    sequence.path.mkdir()
    sequence.config_file.write_text(dump_config(SequenceConfig(runs=(str(run.path),))))
    write_json(sequence.plan_file, {"stage": "sequence"})
    assert write_run_reports(sequence, print) == [run.path / "report.html"]


def test_an_evaluation_that_graded_a_training_has_its_report_written_again(tmp_path):
    home = copied_home(tmp_path)
    run, evaluation = trained(home), RunDirectory(home / "runs" / "evaluation")
    assert write_run_reports(evaluation, print) == []
    graded = {"accuracy": {"value": 0.9, "low": 0.8, "high": 1.0, "outcome": 0.875, "inside": True}}
    write_json(run.result_file, read_json(run.result_file) | {"forecast": graded})
    assert write_run_reports(evaluation, print) == [run.path / "report.html"]
    assert "0.875" in (run.path / "report.html").read_text()


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    run = trained(copied_home(tmp_path))
    (run.path / "provenance.json").write_text("[")
    said: list[str] = []
    assert write_run_reports(run, said.append) == []
    assert len(said) == 1 and "its report.html was not written: " in said[0] and "provenance.json: damaged" in said[0]


def test_an_mlflow_that_is_away_costs_a_line_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("flows.lifecycle_report.WAIT_SECONDS", 0.0)
    registration = RunDirectory(tmp_path / "runs" / "register-birds-001")
    registration.path.mkdir(parents=True)
    registered = {"stage": "register", "uri": "models:/birds/1", "name": "birds", "version": 1, "summary": "first"}
    write_json(registration.result_file, registered)
    record = Record("birds", "/photos", str(tmp_path), "http://127.0.0.1:9", registration=str(registration.path))
    said: list[str] = []
    assert publish(record, said.append) == registration.path / "report.html"
    assert (lifecycle_folder(tmp_path, "birds") / "report.html").is_file()
    assert said[0] == f"report: {registration.path / 'report.html'}"
    assert len(said) == 2 and said[1].startswith(
        "the report is not in MLflow: http://127.0.0.1:9 could not be written: "
    )


def test_a_home_that_takes_no_report_costs_a_line_and_nothing_else(tmp_path):
    (tmp_path / "lifecycles").write_text("a file")
    said: list[str] = []
    assert publish(Record("birds", "/photos", str(tmp_path), "sqlite:///none.db"), said.append) is None
    assert len(said) == 1 and said[0].startswith("the report was not written: ")


def test_the_baselines_of_quickstart_come_into_its_report_with_intervals(digits, tmp_path):
    record = Record(NAME, "sklearn:digits", str(tmp_path), "sqlite:///none.db", data=str(digits))
    record.evaluation = str(copied_home(tmp_path / "old") / "runs" / "evaluation")
    publish(record, print)
    rows = baseline_rows(read_index(digits))
    path = _with_baselines(tmp_path, rows)
    assert path == str(lifecycle_folder(tmp_path, NAME) / "report.html")
    assert all(row["low"] < row["accuracy"] < row["high"] for row in rows) and len(rows) == 4
    best = max(rows, key=lambda row: row["accuracy"])
    text = Page(Path(path).read_text()).text
    assert f"{100 * best['accuracy']:.2f} [{100 * best['low']:.1f}, {100 * best['high']:.1f}]" in text


def test_the_report_of_a_lifecycle_that_failed_is_in_the_last_run_that_mlflow_has(store, tmp_path, monkeypatch):  # noqa: F811
    home, uri = copied_home(tmp_path / "old"), f"sqlite:///{store / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run = trained(home)
    (run.path / "forwarded.json").unlink()
    Forwarder(run, store, print).finish(EXIT_DONE, read_json(run.result_file))
    said: list[str] = []
    monkeypatch.setattr("flows.lifecycle.this_watch", lambda: SimpleNamespace(cancelled=threading.Event()))
    work = Lifecycle(home, LifecycleRequest(str(tmp_path / "nowhere"), "birds"), said.append)
    work.record.runs += [str(run.path), str(home / "runs" / "evaluation"), str(home / "runs" / "never-begun")]
    with pytest.raises(InputError, match="nowhere"):  # its first stage
        work.run()
    assert not [line for line in said if "not in MLflow" in line]
    _, run_id = find_mirrored_run(run, uri)
    (artifact,) = connect(uri).list_artifacts(run_id, "lifecycle")
    assert artifact.path == "lifecycle/report.html"


def test_a_lifecycle_of_which_mlflow_has_no_run_makes_no_store(tmp_path):
    record = Record("birds", "/photos", str(tmp_path), f"sqlite:///{tmp_path / 'mlflow.db'}")
    record.failure = {"stage": "ingest", "reason": "no such folder"}
    said: list[str] = []
    path = publish(record, said.append)
    assert said == [f"report: {path}"] and not (tmp_path / "mlflow.db").exists()


def test_what_cannot_be_looked_into_is_told_without_secrets(tmp_path, monkeypatch):
    secret = "pw12345678"

    def away(*given, **named):
        raise InputError(f"https://bob:{secret}@store/x: 403")

    monkeypatch.setattr("flows.lifecycle.inspection_run", away)
    monkeypatch.setattr("flows.lifecycle.this_watch", lambda: SimpleNamespace(cancelled=threading.Event()))
    work = Lifecycle(tmp_path, LifecycleRequest("/photos", "birds"), print)
    work._timed("inspect", lambda: work._inspect(RunDirectory(tmp_path), tmp_path))
    assert secret not in str(work.record) and "no pictures: https://***@store/x: 403" in str(work.record.stages)


FAILING = """
import sys
from pathlib import Path
from flows.services.temporary_server import prefect_server
with prefect_server(Path(sys.argv[1])):
    from prefect.client.orchestration import get_client
    from flows.lifecycle import lifecycle
    state = lifecycle(source=sys.argv[2], name="birds", ingest_set=["labels=/hf_" + "a" * 30], return_state=True)
    assert state.is_failed(), state
    with get_client(sync_client=True) as client:
        (shown,) = client.read_artifacts()
    print(shown.key, shown.type, shown.data, shown.description)
"""


@pytest.mark.slow
def test_a_lifecycle_that_failed_has_a_report_that_its_flow_run_shows(home, tmp_path):
    (tmp_path / "nowhere").mkdir()
    command = [sys.executable, "-c", FAILING, str(home), str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    path = home / "lifecycles" / "birds" / "report.html"
    assert f"report-birds markdown `{path}`" in done.stdout and "failed at stage ingest" in done.stdout
    assert "Failed at stage ingest" in path.read_text() and f"{tmp_path / 'nowhere'}" in path.read_text()
    assert read_record(path.parent).failure["stage"] == "ingest" and "hf_aaa" not in path.read_text()
