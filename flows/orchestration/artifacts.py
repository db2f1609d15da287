"""What the page of a flow run shows of one run: its progress, a link to its MLflow run, and at the end a table.

All of it is sent from a thread, with short time-outs, and may fail: the run directory holds the truth. A flow run that
is watched again by another process goes on with the artifacts that it has.
"""

import contextlib
import contextvars
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

from flows.control.following import Observation
from flows.control.forwarding import MIRRORED
from flows.control.jobs import Conclusion
from flows.control.progress import progress_line
from flows.home import read_stack, tracking_uri
from flows.orchestration.health import HealthWatch, emit_call, health_table, say_in_state
from flows.services.api import impatient_client
from flows.services.servers import answers
from pipeline.errors import EXIT_DONE
from pipeline.health.verdicts import in_one_line
from pipeline.registry.tracking import find_mirrored_run
from pipeline.run_directory import RunDirectory
from pipeline.words import duration_in_words

SEND_SECONDS = 7.0
LAST_SECONDS = 20.0  # for what is being sent when the run has ended


class RunArtifacts:
    """The artifacts of one run on one flow run's page. `observe` may be called as often as one likes."""

    def __init__(self, run: RunDirectory, home: Path, flow_run_id: str):
        self.run, self.home, self.flow_run_id = run, home, UUID(flow_run_id)
        self.stage = run.plan()["stage"]
        self._newest: Observation | None = None
        self._sent_step = -1
        self._ids: dict[str, UUID] = {}
        self._linked, self._tabled = self.stage not in MIRRORED, False
        self._health = HealthWatch(run)
        self._ended, self._began = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._send,), daemon=True)

    def observe(self, observation: Observation) -> None:
        self._newest = observation

    def start(self) -> None:
        self._thread.start()

    def finish(self, conclusion: Conclusion) -> bool:
        """Send what is not there yet, and the table; whether all of it was taken. May be called again where not."""
        self.end()
        parts = (self._show_progress, self._show_health, self._link, lambda client: self._table(client, conclusion))
        taken = []
        for part in parts:
            taken.append(False)
            with contextlib.suppress(Exception), impatient_client() as client:
                part(client)
                taken[-1] = True
        return all(taken)

    def end(self) -> None:
        """Send nothing more."""
        if not self._ended.is_set():
            self._ended.set()
            self._seconds = time.monotonic() - self._began
            self._thread.join(timeout=LAST_SECONDS)

    def _send(self) -> None:
        while not self._ended.wait(SEND_SECONDS):
            with contextlib.suppress(Exception), impatient_client() as client:
                self._show_progress(client)
                self._show_health(client)
                self._link(client)

    def _show_progress(self, client: SyncPrefectClient) -> None:
        seen = self._newest
        if seen is None or not seen.last_step or seen.step == self._sent_step or not seen.entry:
            return
        share, words = 100.0 * seen.step / seen.last_step, progress_line(seen.entry, seen.last_step)
        description = f"{self.run.path.name}: {words}"
        self._put(client, "progress", share, description)
        self._sent_step = seen.step

    def _show_health(self, client: SyncPrefectClient) -> None:
        """The newest verdicts, and where the policy asks for it, once, a call for help while the run goes on."""
        if not (measurements := self._health.fresh()):
            return
        newest = measurements[-1]
        self._put(client, "markdown", health_table(newest), in_one_line(newest), key="health")
        if (words := self._health.call_for_help(measurements)) is not None:
            emit_call(self.run, self.flow_run_id, words, newest)
            self._health.called(measurements)
            if not self._ended.is_set():
                say_in_state(client, self.flow_run_id, words)
        self._health.shown()

    def _link(self, client: SyncPrefectClient) -> None:
        if self._linked or not (self.run.path / "forwarded.json").exists():
            return
        uri = tracking_uri(self.home)
        found = find_mirrored_run(self.run, uri)
        if found is not None:
            address = mlflow_address(uri, (read_stack(self.home) or {}).get("mlflow_url"), *found)
            words = f"MLflow run of {self.run.path.name}: {address}"
            shown = f"[{address}]({address})" if address.startswith("http") else f"`{address}`"
            self._put(client, "markdown", shown, words, key="mlflow")
            self._linked = True

    def _table(self, client: SyncPrefectClient, conclusion: Conclusion) -> None:
        if not self._tabled:
            row = result_row(self.run, conclusion, self._seconds)
            self._put(client, "table", json.dumps([row]), conclusion.message, key="result")
            self._tabled = True

    def _put(
        self, client: SyncPrefectClient, kind: str, data: Any, description: str, key: str | None = None
    ) -> None:  # fmt: skip
        """Make this flow run's artifact of this key, or change the one that it or an earlier process of it made."""
        key = artifact_key(key or kind, self.run)
        known = self._ids.get(key) or _made_earlier(client, self.flow_run_id, key)
        self._ids[key] = _put(client, known, self.flow_run_id, key, kind, data, description)


def show(flow_run_id: str, name: str, markdown: str, description: str) -> None:
    """Make a flow run's artifact of this name, or change the one that it has. Raises whatever the API raises."""
    of_run, key = UUID(flow_run_id), prefect_key(name)
    with impatient_client() as client:
        _put(client, _made_earlier(client, of_run, key), of_run, key, "markdown", markdown, description)


def _put(
    client: SyncPrefectClient, known: UUID | None, of_run: UUID, key: str, kind: str, data: Any, description: str
) -> UUID:  # fmt: skip
    if known is None:
        made = ArtifactCreate(key=key, type=kind, data=data, description=description, flow_run_id=of_run)
        return client.create_artifact(made).id
    client.update_artifact(known, ArtifactUpdate(data=data, description=description))
    return known


def _made_earlier(client: SyncPrefectClient, of_run: UUID, key: str) -> UUID | None:
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[of_run]))
    found = client.read_artifacts(artifact_filter=wanted, limit=1)
    return found[0].id if found else None


@contextlib.contextmanager
def run_artifacts(run: RunDirectory, home: Path, flow_run_id: str) -> Iterator[RunArtifacts]:
    """Artifacts for the length of the block; `finish` them inside it to have the table too."""
    artifacts = RunArtifacts(run, home, flow_run_id)
    artifacts.start()
    try:
        yield artifacts
    finally:
        artifacts.end()


def artifact_key(what: str, run: RunDirectory) -> str:
    return prefect_key(f"{what}-{run.key}")


def prefect_key(name: str) -> str:
    """Prefect's keys are of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def result_row(run: RunDirectory, conclusion: Conclusion, seconds: float) -> dict[str, Any]:
    """The row of the table: what is not known of this stage is an empty string."""
    result, newest = conclusion.result, run.newest_checkpoint()
    metrics = result.get("metrics") or {}
    loss = metrics.get("train/loss")
    best = result.get("best") or {}
    return {
        "stage": run.plan()["stage"],
        "run": str(run.path),
        "result": "done" if conclusion.code == EXIT_DONE else conclusion.reason,
        "steps": result.get("steps", newest.step if newest else ""),
        "loss": round(loss, 4) if isinstance(loss, float) else "",
        "validation": f"{best['metric']} {best['value']:.4f} at step {best['step']}" if best else "",
        "checkpoint": newest.directory.name if newest else "",
        "time": duration_in_words(seconds),
        "seconds": round(seconds, 1),
    }


def mlflow_address(uri: str, local_server: str | None, experiment: str, run_id: str) -> str:
    """Where a person looks at an MLflow run: in the UI of the store's server, or of the local one that serves the same
    file; without a server, the store itself."""
    server = uri if uri.startswith("http") else local_server
    if server is None or (server == local_server and not answers(f"{server}/health")):
        return f"{uri} run {run_id}"
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
