"""A copy of a run's committed checkpoints in an object store, made in the background, and brought back from there.

As on the disk a checkpoint there is complete when it has its manifest.json, which is copied last and removed first.
"""

import json
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from pathlib import Path

from pipeline.checkpoints.files import is_intact
from pipeline.errors import FaultError, InputError
from pipeline.run_directory import Checkpoint, RunDirectory
from pipeline.shards.atomic import replaced_file, sync_directory, write_file
from pipeline.storage import remote
from pipeline.storage.location import location

MANIFEST = "manifest.json"
LAST_COPY_SECONDS = 300.0  # how long the end of a run waits for its last copy
log = logging.getLogger(__name__)


class CheckpointMirror:
    """Copies checkpoints of one run to `url`/<name of the run>. A copy that fails is told, and stops nothing."""

    def __init__(self, url: str, run: RunDirectory):
        location(url)  # refuses credentials
        self.url, self.run = f"{url.rstrip('/')}/{run.path.resolve().name}", run
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._last: Future | None = None

    def copy(self, checkpoint: Checkpoint) -> None:
        """Copy in the background, behind what was asked for before."""
        self._last = self._thread.submit(self._told, self._copy, checkpoint)

    def remove(self, names: list[str]) -> None:
        """Remove checkpoints, in the background."""
        for name in names:
            self._last = self._thread.submit(self._told, self._remove, name)

    def wait(self) -> None:
        """Wait for all copies, within reason: the disk has them too."""
        try:
            if self._last is not None:
                self._last.result(LAST_COPY_SECONDS)
        except StillRunning:
            log.warning("%s: the last copy is not complete after %.0f s; not waiting", self.url, LAST_COPY_SECONDS)

    def fetch_newest(self) -> Path | None:
        """Bring the newest checkpoint that is whole into the run directory; None where there is none. Rank 0 only."""
        for name in sorted((name for name in remote.names_in(self.url) if name.startswith("step-")), reverse=True):
            partial = self.run.checkpoints / f"{name}.mirror.partial"
            try:
                self._fetch(name, partial)
            except FileNotFoundError:
                continue  # never completed, or on its way out
            except ValueError as error:
                log.warning("%s/%s is damaged, trying the one before: %s", self.url, name, error)
                continue
            partial.rename(self.run.checkpoints / name)
            sync_directory(self.run.checkpoints)
            log.info("brought %s back from %s", name, self.url)
            return self.run.checkpoints / name
        return None

    def _fetch(self, name: str, partial: Path) -> None:
        """FileNotFoundError where a file is missing, ValueError where one is not what the manifest says."""
        content = remote.read_range(f"{self.url}/{name}/{MANIFEST}", 0, None)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, entry in json.loads(content)["files"].items():
            if Path(file).name != file:
                raise ValueError(f"{MANIFEST} names {file!r}, which is no plain file name")
            with replaced_file(partial / file) as target:
                target.writelines(remote.stream(f"{self.url}/{name}/{file}", entry["bytes"]))
            if not is_intact(partial / file, entry):
                raise ValueError(f"{file}: its bytes are not those that were written")
        write_file(partial / MANIFEST, content)

    def _told(self, work, argument) -> None:
        try:
            work(argument)
        except (FaultError, InputError, OSError) as error:
            log.warning("%s: not up to date, training goes on: %s", self.url, error)

    def _copy(self, checkpoint: Checkpoint) -> None:
        there, manifest = f"{self.url}/{checkpoint.directory.name}", checkpoint.directory / MANIFEST
        if not manifest.exists():
            return  # removed meanwhile: a newer one follows
        if MANIFEST in remote.names_in(there):
            if remote.read_range(f"{there}/{MANIFEST}", 0, None) == manifest.read_bytes():
                return
            remote.remove(f"{there}/{MANIFEST}")
        for file in checkpoint.manifest["files"]:
            remote.upload(checkpoint.directory / file, f"{there}/{file}")
        remote.upload(manifest, f"{there}/{MANIFEST}")
        log.info("copied %s to %s", checkpoint.directory.name, self.url)

    def _remove(self, name: str) -> None:
        remote.remove(f"{self.url}/{name}/{MANIFEST}")
        remote.remove(f"{self.url}/{name}")
