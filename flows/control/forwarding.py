"""Forwarding a run's ledger while a controller follows it: to MLflow, and to the writers that its config names."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.control.run_reports import write_run_reports
from flows.home import tracking_uri
from pipeline.errors import EXIT_DONE, EXIT_STOPPED
from pipeline.registry.tracking import Mirror
from pipeline.registry.writers import writers_of
from pipeline.run_directory import RunDirectory

FORWARD_SECONDS = 5.0
MIRRORED = ("pretrain", "finetune", "evaluate")  # stages that have a ledger or scores


class Forwarder:
    """Forwards from a thread of its own, so that a slow server never delays what a person sees."""

    def __init__(self, run: RunDirectory, home: Path, report: Callable[[str], None]):
        self.mirror = Mirror(run, tracking_uri(home), home)
        self.writers = writers_of(run)
        self.report, self.warned, self.ended = report, set[str](), threading.Event()
        self.enabled = run.plan()["stage"] in MIRRORED
        self.thread = threading.Thread(target=self._run, daemon=True)
        if self.enabled:
            self.thread.start()

    def _run(self) -> None:
        while not self.ended.wait(FORWARD_SECONDS):
            self._forward()

    def _forward(self) -> None:
        self._guarded(self._destination, self.mirror.forward)
        for writer in self.writers:
            self._guarded(type(writer).__name__, writer.forward)

    def leave(self) -> None:
        """Forward what there is and stop: the run goes on, and is forwarded again by whoever follows it next."""
        if self.enabled:
            self._stop()
            self._forward()

    def finish(self, code: int, result: dict[str, Any]) -> None:
        """Write the run's report, forward what there is and say how the run ended."""
        write_run_reports(self.mirror.run, self.report)
        if not self.enabled:
            return
        self._stop()
        status = {EXIT_DONE: "FINISHED", EXIT_STOPPED: "KILLED"}.get(code, "FAILED")
        tags = {"vit.rehearsal": str(bool(result.get("rehearsal"))).lower()}
        metrics = result["metrics"] if result.get("stage") == "evaluate" else {}
        several = len(metrics) > 1
        scores = {
            f"{model}/{key}" if several else key: value
            for model, scored in metrics.items()
            for key, value in scored.items()
        }
        self._guarded(self._destination, lambda: self.mirror.finish(status, metrics=scores, tags=tags))
        for writer in self.writers:
            self._guarded(type(writer).__name__, writer.finish)

    def _stop(self) -> None:
        self.ended.set()
        self.thread.join(timeout=60)

    @property
    def _destination(self) -> str:
        return f"MLflow at {self.mirror.tracking_uri}"

    def _guarded(self, destination: str, forward: Callable[[], Any]) -> None:
        """Tracking never ends a run: what could not be sent is sent later by `vit reconcile` or the next attempt."""
        try:
            forward()
        except Exception as error:  # MLflow raises whatever its store and its HTTP library raise
            if destination not in self.warned:
                self.warned.add(destination)
                first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.report(f"{destination} could not be written, the ledger keeps everything: {first_line[:160]}")
