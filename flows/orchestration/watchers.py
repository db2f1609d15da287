"""Which flow run watches which runs: one small file per flow run, `home/flow_runs/<flow run id>.json`.

Written by the flow's process before it submits anything and removed when it has said how they ended. So who is asked to
cancel a flow run finds its jobs by one look, and what is left there of a process that is gone is what `vit reconcile`
has to settle. Prefect is not imported.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline.run_directory import RunDirectory, write_json

FOLDER = "flow_runs"
BEAT_SECONDS = 10.0
FRESH_SECONDS = 90.0  # a note of another machine that nobody touched for so long is left alone by its process


class WatcherNote:
    """The note of one flow run in a home; it need not exist.

    `single` says that the flow ends as its one run does; a lifecycle has several. Its file's time is the sign of life
    that other machines see.
    """

    def __init__(self, home: Path, flow_run_id: str):
        self.id = flow_run_id
        self.path = home / FOLDER / f"{flow_run_id}.json"
        self._lock = threading.Lock()

    def begin(self, *, single: bool) -> None:
        """This process watches from now on; runs that an earlier process of the flow run knew stay known."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whose = {"host": socket.gethostname(), "process": _identity(psutil.Process()), "single": single}
        with self._lock:
            write_json(self.path, whose | {"runs": self._content().get("runs", [])})

    def add(self, run: RunDirectory) -> None:
        path = str(run.path.absolute())
        with self._lock:
            content = self._content()
            if path not in content.get("runs", []):
                write_json(self.path, content | {"runs": [*content.get("runs", []), path]})

    def beat(self) -> None:
        if self.path.exists() and time.time() - self.path.stat().st_mtime > BEAT_SECONDS:
            os.utime(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def runs(self) -> list[RunDirectory]:
        """The run directories, oldest first; those that were deleted are not among them."""
        runs = [RunDirectory(path) for path in self._content().get("runs", [])]
        return [run for run in runs if run.config_file.is_file()]

    @property
    def single(self) -> bool:
        return self._content().get("single", False)

    def lives(self) -> bool:
        """Whether the flow's process does: by its number and start here, by the note's age on another machine."""
        content = self._content()
        if not content:
            return False
        if content["host"] != socket.gethostname():
            return time.time() - self.path.stat().st_mtime < FRESH_SECONDS
        pid, _, started = content["process"].partition(":")
        try:
            process = psutil.Process(int(pid))
            return _identity(process) == f"{pid}:{started}" and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _content(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return {}


def watcher_notes(home: Path) -> Iterator[WatcherNote]:
    """The notes of a home, oldest first."""
    for path in sorted((home / FOLDER).glob("*.json"), key=lambda path: path.stat().st_mtime):
        yield WatcherNote(home, path.stem)


def _identity(process: psutil.Process) -> str:
    return f"{process.pid}:{process.create_time():.2f}"
