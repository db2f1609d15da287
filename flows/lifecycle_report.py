"""The report of a lifecycle where people look: on disk, in MLflow beside the registered model, on the flow run's page.

Neither a page that cannot be written nor a server that is away takes anything from a trained model: it is said in one
line, and the next lifecycle of the name writes it again.
"""

import time
from collections.abc import Callable
from pathlib import Path

from flows.control.forwarding import MIRRORED
from flows.home import read_stack
from pipeline.redaction import first_line, without_secrets
from pipeline.report.lifecycle_report import write_lifecycle_report
from pipeline.report.record import Record
from pipeline.run_directory import RunDirectory, read_json

ARTIFACTS = "lifecycle"  # the folder of the MLflow run
TRIES = 3
WAIT_SECONDS = 1.0  # doubled with each try


def lifecycle_folder(home: Path, name: str) -> Path:
    """Where the newest lifecycle of a name has its record, its report and its pictures."""
    return home / "lifecycles" / name


def publish(record: Record, report: Callable[[str], None]) -> Path | None:
    """Write the report, log it and show it; returns the path that a person opens, None where there is none."""
    try:
        path = write_lifecycle_report(record, lifecycle_folder(Path(record.home), record.name))[-1]
    except Exception as error:  # whatever a damaged file or a full disk makes of it
        report(f"the report was not written: {first_line(error)}")
        return None
    report(f"report: {path}")
    address = None
    try:
        address = _log(path, record)
    except Exception as error:  # MLflow raises whatever its store and its HTTP library raise
        where = without_secrets(record.tracking_uri)
        report(f"the report is not in MLflow: {where} could not be written: {first_line(error)}")
    try:
        _show(path, address, record)
    except Exception as error:  # whatever the API, its client or the network raise
        report(f"the report is not linked in Prefect: {first_line(error)}")
    return path


def _log(path: Path, record: Record) -> str | None:
    """Put it into the MLflow run of the registered version, of a lifecycle that did not come so far into that of its
    last run that has one; where a person opens it, None without a server or such a run."""
    from flows.orchestration.artifacts import mlflow_address
    from pipeline.registry.tracking import connect

    for number in range(1, TRIES + 1):
        try:
            if (found := _registered(record) if record.registration else _last_mirrored(record)) is None:
                return None
            experiment, run_id = found
            connect(record.tracking_uri).log_artifact(run_id, str(path), artifact_path=ARTIFACTS)
            break
        except Exception:
            if number == TRIES:
                raise
            time.sleep(WAIT_SECONDS * 2 ** (number - 1))
    server = (read_stack(Path(record.home)) or {}).get("mlflow_url")
    address = without_secrets(mlflow_address(record.tracking_uri, server, experiment, run_id))
    return f"{address}/artifacts/{ARTIFACTS}/{path.name}" if address.startswith("http") else None


def _registered(record: Record) -> tuple[str, str]:
    """Experiment and run of the registered version."""
    from pipeline.registry.tracking import connect

    registered = read_json(RunDirectory(record.registration).result_file) or {}
    client = connect(record.tracking_uri)
    run_id = client.get_model_version(registered["name"], str(registered["version"])).run_id
    return client.get_run(run_id).info.experiment_id, run_id


def _last_mirrored(record: Record) -> tuple[str, str] | None:
    """Experiment and run of the newest run of a lifecycle that MLflow has; None where it has none."""
    from pipeline.registry.tracking import find_mirrored_run

    for path in reversed(record.runs):
        run = RunDirectory(path)
        if run.config_file.is_file() and (read_json(run.plan_file) or {}).get("stage") in MIRRORED:
            if (found := find_mirrored_run(run, record.tracking_uri)) is not None:
                return found
    return None


def _show(path: Path, address: str | None, record: Record) -> None:
    """An artifact of the flow run: a link where a server has the page, the path in any case."""
    from prefect.runtime import flow_run

    from flows.orchestration.artifacts import show

    if not flow_run.id:
        return
    failure = record.failure
    ended = f"{failure.get('ended', 'failed')} at stage {failure['stage']}" if failure else "done"
    link = f"[Report of {record.name}]({address})\n\n" if address else ""
    words = f"report of lifecycle {record.name}, {ended}: {address or path}"
    show(str(flow_run.id), f"report-{record.name}", f"{link}`{path}`", words)
