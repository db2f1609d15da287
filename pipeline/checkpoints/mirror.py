"""A copy of a run's committed checkpoints in an object store, made in the background, and brought back from there.

As on the disk a checkpoint there is complete when it has its manifest.json, which is copied last and removed first.
Whose copies they are stands beside them in run.json: no other run takes, replaces or removes them. Torch-free.
"""

import json
import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from pathlib import Path

from pipeline.checkpoints.checksums import is_intact
from pipeline.checkpoints.identity import facts_of_run, require_own
from pipeline.checkpoints.retention import set_aside
from pipeline.config.stages import read_run_config
from pipeline.errors import FaultError, InputError
from pipeline.run_directory import Checkpoint, RunDirectory
from pipeline.shards.atomic import replaced_file, sync_directory, write_file
from pipeline.storage import remote
from pipeline.storage.location import location

MANIFEST, OWNER = "manifest.json", "run.json"
LAST_COPY_SECONDS = 300.0  # how long the end of a run waits for its last copy
log = logging.getLogger(__name__)


class CheckpointMirror:
    """Copies checkpoints of one run to `url`/<name of the run>. A copy that fails is told, and stops nothing."""

    def __init__(self, url: str, run: RunDirectory):
        location(url)  # refuses credentials
        self.url, self.run = f"{url.rstrip('/')}/{run.path.resolve().name}", run
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._last: Future | None = None

    def claim(self) -> None:
        """Write whose copies lie here, and read it back.

        InputError where they are another run's, or where nothing can be written; FaultError where nobody answers.
        """
        facts = facts_of_run(read_run_config(self.run.path), self.run.plan())
        try:
            self._require_own()
            remote.write(f"{self.url}/{OWNER}", json.dumps(facts).encode())
            self._require_own()
        except (OSError, NotImplementedError) as error:
            raise InputError(f"{self.url}: cannot be written ({error}); is there such a bucket or folder?") from None

    def _require_own(self) -> None:
        """InputError where another run's copies lie here."""
        owner = self._read(OWNER)
        if owner is None and (names := self._names()):
            owner = self._read(f"{names[0]}/{MANIFEST}")  # copied before places had owners
        if owner is not None:
            require_own(owner, self.run, self.url)

    def _names(self) -> list[str]:
        """Checkpoints that lie here, complete or not, newest first."""
        return sorted((name for name in remote.names_in(self.url) if name.startswith("step-")), reverse=True)

    def _read(self, place: str) -> dict | None:
        """The content of a JSON file; None where it is not there, or not whole."""
        try:
            return json.loads(remote.read_range(f"{self.url}/{place}", 0, None))
        except (FileNotFoundError, ValueError):
            return None

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
        """Bring the newest checkpoint that is whole into the run directory; None where there is none. Rank 0 only.

        InputError where it is another run's. What lies in its place, which is damaged, is set aside.
        """
        for name in self._names():
            partial = self.run.checkpoints / f"{name}.mirror.partial"
            try:
                self._fetch(name, partial)
            except FileNotFoundError:
                continue  # never completed, or on its way out
            except ValueError as error:
                log.warning("%s/%s is damaged, trying the one before: %s", self.url, name, error)
                continue
            set_aside([directory for directory in self.run.checkpoint_directories() if directory.name == name])
            partial.rename(self.run.checkpoints / name)
            sync_directory(self.run.checkpoints)
            log.info("brought %s back from %s", name, self.url)
            return self.run.checkpoints / name
        return None

    def _fetch(self, name: str, partial: Path) -> None:
        """FileNotFoundError where a file is missing, ValueError where one is not what the manifest says."""
        content = remote.read_range(f"{self.url}/{name}/{MANIFEST}", 0, None)
        manifest = json.loads(content)
        require_own(manifest, self.run, f"{self.url}/{name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, entry in manifest["files"].items():
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
        self.claim()
        if MANIFEST in remote.names_in(there):
            if remote.read_range(f"{there}/{MANIFEST}", 0, None) == manifest.read_bytes():
                return
            remote.remove(f"{there}/{MANIFEST}")
        for file in checkpoint.manifest["files"]:
            remote.upload(checkpoint.directory / file, f"{there}/{file}")
        remote.upload(manifest, f"{there}/{MANIFEST}")
        log.info("copied %s to %s", checkpoint.directory.name, self.url)

    def _remove(self, name: str) -> None:
        self._require_own()
        remote.remove(f"{self.url}/{name}/{MANIFEST}")
        remote.remove(f"{self.url}/{name}")
