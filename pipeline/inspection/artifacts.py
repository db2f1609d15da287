"""The pictures of an inspection beside the model in MLflow: in the run that trained or registered it."""

import os
from pathlib import Path

from pipeline.errors import InputError
from pipeline.registry.locate import ModelSource
from pipeline.registry.store_file import require_writable_store
from pipeline.registry.tracking import connect, find_mirrored_run
from pipeline.registry.versions import require_tracking_server
from pipeline.run_directory import RunDirectory


def log_pictures(files: list[Path], source: ModelSource, tracking_uri: str) -> str:
    """Send the files to the model's own MLflow run, and say in one line where, or why not. Never ends an inspection."""
    try:
        run_id = _run_of(source, tracking_uri)
        if run_id is None:
            return "not in MLflow: it holds no run of this model"
        require_writable_store(tracking_uri)
        client, folder = connect(tracking_uri), artifact_folder(source)
        for file in files:
            client.log_artifact(run_id, str(file), artifact_path=folder)
        return f"in MLflow: run {run_id}, artifacts {folder}"
    except InputError as error:
        return f"not in MLflow: {error}"
    except Exception as error:  # MLflow raises whatever its store and its HTTP library raise
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"not in MLflow: {tracking_uri} could not be written: {first_line[:160]}"


def artifact_folder(source: ModelSource) -> str:
    """Each step of a run has pictures of its own."""
    step = source.lineage.get("step")
    return f"inspection/step-{int(step):08d}" if step is not None else "inspection"


def _run_of(source: ModelSource, tracking_uri: str) -> str | None:
    store = tracking_uri.removeprefix("sqlite:///")
    if store != tracking_uri and not os.path.exists(store):
        return None  # to ask would make one
    require_tracking_server(tracking_uri)
    if registered := source.lineage.get("registered"):
        name, _, version = registered.removeprefix("models:/").rpartition("/")
        return connect(tracking_uri).get_model_version(name, version).run_id
    trained = source.lineage.get("run")
    if not trained or not (run := RunDirectory(trained)).config_file.is_file():
        return None
    found = find_mirrored_run(run, tracking_uri)
    return found[1] if found else None
