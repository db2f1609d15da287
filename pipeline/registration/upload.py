"""A model's files in MLflow: sent file by file, again where the connection drops, and held to their hashes afterwards.

A version is made only of a model whose every byte the store has given back.
"""

import importlib.metadata
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from pipeline.errors import FaultError
from pipeline.rank import Stopped
from pipeline.registry.integrity import files_in, hashes_in, sha256_of

SERVED_MODEL = Path(__file__).parents[1] / "registry" / "served_model.py"
REQUIREMENTS = ("mlflow", "torch", "torchvision", "timm", "safetensors", "numpy", "pillow")
TRIES = 6  # per file, and of the whole
FIRST_WAIT_SECONDS = 1.0  # doubled with each try
# MLflow would otherwise pin every package of a surrounding project, and try a pip install to check them. Its own
# patience is short: what it gives up on is begun again here.
SETTINGS = {
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_LOG_UV_FILES": "false",
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "120",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
log = logging.getLogger(__name__)


class Uploaded(NamedTuple):
    """A model in the store, whole."""

    model_id: str
    uri: str


def save_served_model(directory: Path, target: Path, width: int, mlflow_model: Any) -> None:
    """Write the pyfunc around timm's `directory`; `width` is of its outputs."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.pyfunc.save_model(
        path=str(target),
        mlflow_model=mlflow_model,
        python_model=str(SERVED_MODEL),
        artifacts={"hf": str(directory)},
        # Outputs only: an input signature would refuse lists, PIL images, bytes and paths.
        signature=ModelSignature(outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, width))])),
        pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
        model_config={"device": "", "batch_size": 32},  # what `load_model(..., model_config=...)` may set
    )


def upload_model(
    client: Any, run_id: str, directory: Path, width: int, metrics: Mapping[str, float], scratch: Path,
    extra: Path | None,
) -> Uploaded:  # fmt: skip
    """Log timm's `directory` as a pyfunc model of an MLflow run, with the files of `extra` beside it.

    FaultError where the store does not take it, or does not give it back as it was; the model is then marked failed.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    run = client.get_run(run_id)
    model = client.create_logged_model(run.info.experiment_id, "model", source_run_id=run_id)
    try:
        saved, about = scratch / "pyfunc", {"run_id": run_id, "model_uuid": model.model_id, "model_id": model.model_id}
        save_served_model(directory, saved, width, Model(artifact_path=model.artifact_location, **about))
        if extra is not None:
            extra.rename(saved / extra.name)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        send_verified(client, model, saved, scratch)
        for key, value in metrics.items():
            client.log_metric(run_id, key, value, model_id=model.model_id)
        client.finalize_logged_model(model.model_id, "READY")
    except FaultError as error:
        _mark_failed(client, model.model_id)
        raise FaultError(f"{error}; no version was made") from error
    except BaseException:
        _mark_failed(client, model.model_id)
        raise
    return Uploaded(model.model_id, f"models:/{model.model_id}")


def _mark_failed(client: Any, model_id: str) -> None:
    try:
        client.finalize_logged_model(model_id, "FAILED")
    except Exception as error:  # the server that took no file may take no word either
        log.warning("%s could not be marked as failed: %s", model_id, _first_line(error))


def send_verified(client: Any, model: Any, saved: Path, scratch: Path) -> None:
    """Send every file below `saved` to a logged model until the store has all of them, byte for byte. FaultError."""
    expected = hashes_in(saved)
    wanting = list(expected)
    for attempt in range(TRIES):
        for name in wanting:
            folder = str(Path(name).parent) if "/" in name else None
            patiently(f"upload of {name}", lambda file=saved / name, folder=folder: client.log_model_artifact(
                model.model_id, str(file), folder))  # fmt: skip
        wanting = damaged(model, {name: expected[name] for name in wanting}, scratch)
        if not wanting:
            return
        log.warning("try %d: the store has other bytes than were sent of %s; sent again", attempt + 1, wanting)
    raise FaultError(f"{model.artifact_location}: after {TRIES} uploads the store has other bytes than were sent of "
                     f"{', '.join(wanting)}")  # fmt: skip


def patiently(what: str, work: Callable[[], Any]) -> Any:
    """The result of `work`, tried again where the server or the way to it fails; FaultError at last."""
    for attempt in range(TRIES):
        try:
            return work()
        except Stopped:
            raise
        except Exception as error:  # whatever a store and its HTTP library raise
            log.warning("%s failed (try %d of %d): %s", what, attempt + 1, TRIES, _first_line(error))
            if attempt == TRIES - 1:
                raise FaultError(f"{what} failed {TRIES} times: {_first_line(error)}") from error
        time.sleep(FIRST_WAIT_SECONDS * 2**attempt)


def damaged(model: Any, expected: Mapping[str, str], scratch: Path) -> list[str]:
    """Names of a logged model's files whose bytes in the store are not those of these hashes: each is read back."""
    if urlparse(model.artifact_location).scheme in ("", "file"):
        folder = Path(urlparse(model.artifact_location).path)
        present = set(files_in(folder))
        return [name for name, digest in expected.items() if name not in present or sha256_of(folder / name) != digest]
    location = model.artifact_location
    return [name for name, digest in expected.items() if _hash_in_store(location, name, scratch) != digest]


def _hash_in_store(location: str, name: str, scratch: Path) -> str | None:
    """The hash of one file as the store gives it back; None where it does not have it."""
    import mlflow
    from mlflow.exceptions import MlflowException

    def hashed() -> str | None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            try:
                return sha256_of(Path(mlflow.artifacts.download_artifacts(f"{location}/{name}", dst_path=folder)))
            except MlflowException as error:
                if error.get_http_status_code() == 404:
                    return None
                raise

    return patiently(f"reading {name} back", hashed)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


def use_settings() -> None:
    """Have MLflow, in this process, upload as this module needs it; before it is imported."""
    os.environ.update(SETTINGS)
