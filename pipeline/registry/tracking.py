"""The mirror of a run directory in MLflow: parameters once, every step of the ledger at least once, the final status.

The trainer never talks to MLflow; the controller forwards. A cursor file makes forwarding resumable, and identical
points are dropped by MLflow itself, so an outage or a killed controller loses nothing and doubles nothing.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.recipe import read_yaml
from pipeline.registry.ledger_cursor import LedgerCursor, metrics_of
from pipeline.registry.store_file import require_writable_store, share_store
from pipeline.registry.versions import every
from pipeline.run_directory import RunDirectory, read_json

KEY_TAG = "vit.run_key"
BATCH = 1000  # metrics per request, MLflow's limit
SHOWN_FILES = ("config.yaml", "plan.json", "provenance.json", "reconstructions.png", "report.html")


def connect(tracking_uri: str) -> Any:
    """An MLflow client that gives up early: a watcher tries again by itself."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    share_store(tracking_uri)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=tracking_uri)


def experiment_id(client: Any, name: str, tracking_uri: str, home: Path) -> str:
    """The experiment of this name; on a local store its artifacts lie where the local server serves them."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = f"file://{home / 'artifacts'}" if tracking_uri.startswith("sqlite:") else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:  # another process made it in between
            found = client.get_experiment_by_name(name)
    return found.experiment_id


def find_mirrored_run(run: RunDirectory, tracking_uri: str) -> tuple[str, str] | None:
    """Experiment and run that mirror a run directory; None where nothing was forwarded yet."""
    client = connect(tracking_uri)
    experiment = client.get_experiment_by_name(f"vit/{read_yaml(run.config_file)['stage']}")
    if experiment is None:
        return None
    found = _run_of_key(client, experiment.experiment_id, run.key)
    return (experiment.experiment_id, found.info.run_id) if found else None


def _run_of_key(client: Any, experiment: str, key: str) -> Any:
    """The MLflow run that mirrors the run directory of this key; None where there is none."""
    return next(iter(client.search_runs([experiment], with_key(key), max_results=1)), None)


def with_key(key: str) -> str:
    """MLflow's filter for runs of this key, which is named after a directory: its quotes cannot be escaped there."""
    if "'" not in key:
        return f"tags.`{KEY_TAG}` = '{key}'"
    pattern = key.replace("'", "_")  # any one character; the end of a key is a hash that no other has
    return f"tags.`{KEY_TAG}` LIKE '{pattern}'"


def keys_left_running(tracking_uri: str) -> set[str]:
    """Keys of the runs that MLflow holds for running, in all experiments of ours."""
    client, keys = connect(tracking_uri), set()
    ours = [each.experiment_id for each in every(client.search_experiments) if each.name.startswith("vit/")]
    token = "" if ours else None
    while token is not None:
        found = client.search_runs(ours, "attributes.status = 'RUNNING'", page_token=token or None)
        keys |= {run.data.tags.get(KEY_TAG, "") for run in found}
        token = found.token or None
    return keys


class Mirror:
    """Forwards one run directory to one MLflow run, found again by the run's key."""

    def __init__(self, run: RunDirectory, tracking_uri: str, home: Path):
        self.run, self.tracking_uri, self.home = run, tracking_uri, home
        self.cursor = LedgerCursor(run, "forwarded.json")
        self.client: Any = None
        self.run_id: str | None = None

    def forward(self) -> None:
        """Send what the ledgers hold beyond the cursor."""
        self._open()
        for lines in self.cursor.fresh():
            self._send(lines)

    def finish(self, status: str, metrics: dict[str, float] | None = None, tags: dict[str, str] | None = None) -> None:
        """Forward the rest, write final metrics, tags and the files that a person looks at, and set the status."""
        self.forward()
        for key, value in (metrics or {}).items():
            self.client.log_metric(self.run_id, _allowed(key), value)
        for key, value in (tags or {}).items():
            self.client.set_tag(self.run_id, key, value)
        for name in SHOWN_FILES:
            if (self.run.path / name).is_file():
                self.client.log_artifact(self.run_id, str(self.run.path / name))
        self.client.set_terminated(self.run_id, status)

    def _open(self) -> None:
        if self.run_id is not None:
            return
        require_writable_store(self.tracking_uri)
        self.client = connect(self.tracking_uri)
        config = read_yaml(self.run.config_file)
        experiment = experiment_id(self.client, f"vit/{config['stage']}", self.tracking_uri, self.home)
        run = _run_of_key(self.client, experiment, self.run.key)
        if run is None:
            tags = {KEY_TAG: self.run.key, "vit.run_directory": str(self.run.path)} | self._provenance_tags()
            run = self.client.create_run(experiment, run_name=self.run.path.name, tags=tags)
        # The answer to an earlier request may have been lost: parameters that are not there yet are sent now.
        self._log_parameters(run.info.run_id, config, known=run.data.params)
        self.run_id = run.info.run_id

    def _log_parameters(self, run_id: str, config: dict[str, Any], known: Mapping[str, str]) -> None:
        """Those that are not `known`: MLflow keeps the values that a run began with."""
        from mlflow.entities import Param

        flat = {_allowed(key): str(value)[:500] for key, value in _flat(config).items()}
        parameters = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(parameters), 100):
            self.client.log_batch(run_id, params=parameters[start : start + 100])

    def _provenance_tags(self) -> dict[str, str]:
        facts = read_json(self.run.provenance_file) or {}
        tags = {
            "vit.config_sha256": facts.get("config_sha256"),
            "vit.git_commit": (facts.get("code") or {}).get("commit"),
            "vit.data_fingerprint": (facts.get("data") or {}).get("fingerprint"),
            "vit.parent": facts.get("parent"),
        }
        return {key: str(value) for key, value in tags.items() if value}

    def _send(self, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, int(line["time"] * 1000), line["step"])
            for line in lines
            for key, value in metrics_of(line).items()
        ]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])


def _allowed(key: str) -> str:
    """A key without the characters that MLflow refuses."""
    return re.sub(r"[^\w\-./ ]", "-", key)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
