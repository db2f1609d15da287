"""MLflow's registry: which version a reference names, and its files on this machine, held to their hashes."""

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline.errors import InputError, near_matches
from pipeline.registry.integrity import require_intact

CACHE = "registered"  # the folder of a home for what was fetched from a registry
HF_DIRECTORY = "artifacts/hf"  # timm's own layout, within a registered model


def require_tracking_server(uri: str, timeout_seconds: float = 5.0) -> None:
    """InputError where the tracking store is a server that does not answer; quick, before MLflow's patient retries."""
    parts = urlparse(uri)
    if parts.scheme not in ("http", "https"):
        return
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        socket.create_connection((parts.hostname or "", port), timeout=timeout_seconds).close()
    except OSError as error:
        raise InputError(
            f"MLflow server {uri} does not answer ({error.strerror or error}); start it, or correct MLFLOW_TRACKING_URI"
        ) from None


def connected(tracking_uri: str) -> Any:
    """A client of the registry at `tracking_uri`, which it asks from now on; InputError where nobody answers."""
    require_tracking_server(tracking_uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    return mlflow.MlflowClient()


def registered_version(client: Any, reference: str, tracking_uri: str) -> Any:
    """The model version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names; InputError with the near ones."""
    from mlflow.exceptions import MlflowException

    name, at, choice = reference.removeprefix("models:/").partition("@")
    if not at:
        name, _, choice = name.partition("/")
    if not name or not choice:
        raise InputError(f"MODEL `{reference}`: say models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        found = client.get_model_version_by_alias if at else client.get_model_version
        return found(name, choice)
    except MlflowException as error:
        words = _what_there_is(client, name, choice, alias=bool(at)) or str(error).splitlines()[0]
        raise InputError(f"MODEL `{reference}` is not registered at {tracking_uri}; {words}") from None


def _what_there_is(client: Any, name: str, choice: str, *, alias: bool) -> str:
    """What a reference that is not there may have meant: another name, alias or version."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException:
        known = [model.name for model in client.search_registered_models(max_results=200)]
        return near_matches(name, known) or "nothing is"
    versions = {str(version.version) for version in client.search_model_versions(f"name='{name}'", max_results=200)}
    if alias:
        hint = near_matches(choice, model.aliases) or "it has no alias"
        return f"no alias `{choice}`; {hint}" + (f"; say models:/{name}/{choice}" if choice in versions else "")
    if choice in model.aliases:
        return f"no version `{choice}`; say models:/{name}@{choice}"
    return f"no version `{choice}`; there are: {', '.join(sorted(versions, key=int)[-10:]) or 'none'}"


def whole_directory(client: Any, version: Any, home: Path) -> Path:
    """timm's directory of a model version, every file held to its hash; a copy that was damaged here is fetched again.

    InputError where it is not what was registered, or was not registered by us.
    """
    uri, cache = f"models:/{version.name}/{version.version}", home / CACHE
    for again in (False, True):
        root = artifacts_of(client, version, home)
        directory = root / HF_DIRECTORY
        if not (directory / "config.json").is_file():
            raise InputError(f"MODEL `{uri}` was not registered by `vit register`: it has no {HF_DIRECTORY}")
        try:
            require_intact(f"MODEL `{uri}`", directory, version.tags.get("vit.artifact_sha256"))
            break
        except InputError:
            if again or not root.is_relative_to(cache):
                raise
            shutil.rmtree(root)
    return directory


def artifacts_of(client: Any, version: Any, home: Path) -> Path:
    """The files of a model version on this machine, for reading alone: where the store has them, if it is a folder
    here; else in `home/registered`, fetched once. InputError where they cannot be had."""
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = f"models:/{version.name}/{version.version}"
    cached = home / CACHE / f"{version.name}-{version.version}-{version.tags.get('vit.artifact_sha256', '')[:16]}"
    try:
        if urlparse(client.get_model_version_download_uri(version.name, version.version)).scheme in ("", "file"):
            return Path(mlflow.artifacts.download_artifacts(uri))
        if not cached.is_dir():
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".tmp-") as partial:
                fetched = Path(mlflow.artifacts.download_artifacts(uri, dst_path=partial))
                with contextlib.suppress(OSError):  # another process was quicker
                    fetched.rename(cached)
    except (MlflowException, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"MODEL `{uri}`: its artifacts cannot be read: {reason}") from None
    return cached
