"""MLflow's registry: which version a reference names, and its files on this machine, held to their hashes."""

import contextlib
import json
import os
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline.errors import InputError, near_matches
from pipeline.registry.integrity import require_intact
from pipeline.shards.atomic import give_usual_rights

CACHE = "registered"  # the folder of a home for what was fetched from a registry
STORES = ("postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")  # beside sqlite, http and folders
API = "/api/2.0/mlflow/experiments/search?max_results=1"
CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_AUTH")
ANSWER_SECONDS = 30.0  # a server that is just starting needs some
CORRECT = "correct MLFLOW_TRACKING_URI"
SAY_WHO = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
HF_DIRECTORY = "artifacts/hf"  # timm's own layout, within a registered model


def require_tracking_server(uri: str, timeout_seconds: float = 5.0) -> None:
    """InputError where there can be no MLflow at this address: it is none, its folder is not there, or its server does
    not answer, asks who is there, or is another. Makes nothing, and is quick, before MLflow's patient retries."""
    try:
        parts = urlparse(uri)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise InputError(f"MLflow store {uri}: {error}; {CORRECT}") from None
    if parts.scheme not in ("http", "https"):
        return _require_local_store(uri, parts.scheme)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=timeout_seconds).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"MLflow server {uri} does not answer ({reason}); start it, or {CORRECT}") from None
    if not any(name in os.environ for name in CREDENTIALS):  # whoever asks for them may answer with a page
        _require_mlflow(uri, parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())


def _require_local_store(uri: str, scheme: str) -> None:
    """InputError for what MLflow could not open, or would make in a place that nobody meant."""
    if scheme.startswith("sqlite"):
        file = sqlite_file(uri)
        if file is None:
            raise InputError(f"MLflow store {uri}: no path; say sqlite:///PATH, or {CORRECT}")
        # The home's own store is made with the home.
        if os.environ.get("MLFLOW_TRACKING_URI") == uri and not file.parent.is_dir():
            raise InputError(f"MLflow store {uri}: the folder {file.parent} does not exist; make it, or {CORRECT}")
    elif scheme in ("", "file"):
        folder = Path(urlparse(uri).path)
        if not folder.is_dir():
            raise InputError(f"MLflow store {uri}: the folder {folder} does not exist; make it, or {CORRECT}")
    elif scheme.partition("+")[0] not in STORES and scheme not in entry_points(group="mlflow.tracking_store").names:
        raise InputError(f"MLflow store {uri}: {scheme}:// is no store of MLflow's; say http(s)://HOST:PORT or "
                         f"sqlite:///PATH, or {CORRECT}")  # fmt: skip


def sqlite_file(uri: str) -> Path | None:
    """The database file of an sqlite store; None where the address is another, or names no file."""
    scheme, found, path = uri.partition(":///")
    path = path.partition("?")[0]
    return Path(path) if found and scheme.startswith("sqlite") and path else None


def _require_mlflow(uri: str, address: str) -> None:
    """InputError where what answers at an address is certainly no MLflow; of a door or a fault MLflow tells itself."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}{API}", timeout=ANSWER_SECONDS) as answer:
            if isinstance(json.load(answer), dict):
                return
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise InputError(f"MLflow server {uri} asks for a user and password (401); {SAY_WHO}") from None
        if error.code not in (404, 405, 410, 501):
            return
    except (TimeoutError, ConnectionError) as error:
        raise InputError(f"MLflow server {uri} does not answer ({error}); start it, or {CORRECT}") from None
    except OSError:  # certificates, whose settings are MLflow's own
        return
    except (ValueError, HTTPException):
        pass
    raise InputError(f"MLflow server {uri}: what answers there is no MLflow; {CORRECT}")


def connected(tracking_uri: str) -> Any:
    """A client for reading the registry at `tracking_uri`, which MLflow asks from now on.

    InputError where there is none or it does not answer; none is made.
    """
    require_tracking_server(tracking_uri)
    if (file := sqlite_file(tracking_uri)) is not None and not file.is_file():
        raise InputError(f"MLflow store {tracking_uri}: nothing is registered there, it does not exist yet; register a "
                         f"run first, or {CORRECT}")  # fmt: skip
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    try:
        client = mlflow.MlflowClient(tracking_uri)
        client.search_registered_models(max_results=1)
    except Exception as error:  # whatever MLflow, a database's driver or an HTTP library raises
        if getattr(error, "error_code", "") == "UNAUTHENTICATED" or "error code 401" in str(error):
            raise InputError(f"MLflow server {tracking_uri} does not know you (401); {SAY_WHO}") from None
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise InputError(f"MLflow store {tracking_uri} cannot be read: {reason}; {CORRECT}") from None
    mlflow.set_tracking_uri(tracking_uri)
    return client


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
        known = [model.name for model in every(client.search_registered_models, max_results=200)]
        return near_matches(name, known) or "nothing is"
    versions = {str(version.version) for version in versions_named(client, name)}
    if alias:
        hint = near_matches(choice, model.aliases) or "it has no alias"
        return f"no alias `{choice}`; {hint}" + (f"; say models:/{name}/{choice}" if choice in versions else "")
    if choice in model.aliases:
        return f"no version `{choice}`; say models:/{name}@{choice}"
    return f"no version `{choice}`; there are: {', '.join(sorted(versions, key=int)[-10:]) or 'none'}"


def versions_named(client: Any, name: str) -> list[Any]:
    """All versions of a registered model."""
    quoted = name.replace("'", "''")
    return every(client.search_model_versions, f"name = '{quoted}'", max_results=200)


def every(search: Callable[..., Any], *arguments: Any, **keys: Any) -> list[Any]:
    """What one of MLflow's searches finds, on all its pages."""
    found, token = [], None
    while True:
        page = search(*arguments, page_token=token, **keys)
        found += page
        token = page.token
        if not token:
            return found


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
                give_usual_rights(fetched)
                with contextlib.suppress(OSError):  # another process was quicker
                    fetched.rename(cached)
    except (MlflowException, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"MODEL `{uri}`: its artifacts cannot be read: {reason}") from None
    return cached
