"""Where a run goes on: its newest checkpoint whose every file has the bytes that its manifest promises.

Each rank reads its part of the files once, so that a thousand ranks read a checkpoint once between them; which
checkpoint it is, rank 0 decides for all.
"""

import json
import logging
import os
from pathlib import Path

from torch.distributed import Store

from pipeline.checkpoints.checksums import is_intact
from pipeline.checkpoints.identity import require_own
from pipeline.checkpoints.mirror import CheckpointMirror
from pipeline.checkpoints.retention import set_aside
from pipeline.errors import FaultError, InputError
from pipeline.meeting import in_the_words_of_rank_0
from pipeline.rank import Rank
from pipeline.run_directory import FORMAT_VERSION, Checkpoint, RunDirectory

log = logging.getLogger(__name__)


def newest_intact_checkpoint(me: Rank, store: Store, mirror: str | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies, the same on all ranks; None where there is none at all. Collective.

    Where the run directory has none that does, the newest of the `mirror` (a URL) is brought there. Damaged ones are
    named in the log and set aside as `step-N.damaged`. InputError where all are damaged: to begin again from nothing is
    not for a program to decide; and where it is another run's. FaultError where the mirror does not answer.
    """
    checkpoint, faults = _newest_here(me, store)
    if checkpoint is None and mirror and _bring_back(me, store, mirror):
        checkpoint, faults = _newest_here(me, store)
    if checkpoint is not None:
        require_own(checkpoint.manifest, me.run, checkpoint.directory)
    elif faults:
        raise InputError(
            f"{me.run.checkpoints}: none of its checkpoints is intact, of the oldest: {faults[0]}; bring "
            "one back from a copy, or remove the directory to begin from the first step"
        )
    return checkpoint


def _newest_here(me: Rank, store: Store) -> tuple[Checkpoint | None, list[str]]:
    """The newest of the run directory that verifies, those before it set aside; or what is wrong with the oldest."""
    names = [directory.name for directory in me.run.checkpoint_directories()] if me.is_first else None
    damaged: list[Path] = []
    faults: list[str] = []
    for name in in_the_words_of_rank_0(me, store, names, lambda said: said[0]):
        directory = me.run.checkpoints / name
        faults = faults_of_share(directory, me.rank, me.world_size)
        faults = in_the_words_of_rank_0(me, store, faults, lambda said: [fault for part in said for fault in part])
        if not faults:
            if me.is_first:
                set_aside(damaged)
            return Checkpoint(directory, json.loads((directory / "manifest.json").read_text())), []
        damaged.append(directory)
        if me.is_first:
            log.warning("%s is damaged, falling back to the one before: %s", directory, faults[0])
    return None, faults


def _bring_back(me: Rank, store: Store, mirror: str) -> bool:
    """Whether rank 0 brought a checkpoint; all that was here, damaged, is then set aside. Collective."""
    found = _brought(me.run, mirror) if me.is_first else None
    brought, problems, fault = in_the_words_of_rank_0(me, store, found, lambda said: said[0])
    if problems:
        raise InputError(*problems)
    if fault:
        raise FaultError(fault)
    return brought


def _brought(run: RunDirectory, mirror: str) -> tuple[bool, list[str], str | None]:
    """Whether a checkpoint was brought, what a person has to mend, and why the mirror could not be asked."""
    damaged = run.checkpoint_directories()
    try:
        newest = CheckpointMirror(mirror, run).fetch_newest()
    except InputError as error:
        return False, error.problems, None
    except (FaultError, OSError) as error:
        return False, [], f"checkpoint.mirror {mirror}: {error}"
    if newest is not None:
        set_aside(directory for directory in damaged if directory != newest)
    return newest is not None, [], None


def faults_of_share(directory: Path, rank: int, world_size: int) -> list[str]:
    """What is wrong with this rank's part of a checkpoint's files, one line each; InputError for a newer format."""
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        files, version = sorted(manifest["files"].items()), manifest.get("format_version", FORMAT_VERSION)
    except (OSError, ValueError, KeyError) as error:
        return [f"{path}: {type(error).__name__}: {error}"]
    if version > FORMAT_VERSION:
        raise InputError(f"{path}: format_version {version}: this program reads up to {FORMAT_VERSION}; update it")
    return [fault for name, entry in files[rank::world_size] if (fault := _fault(directory / name, entry))]


def _fault(path: Path, entry: dict) -> str | None:
    try:
        if (size := os.path.getsize(path)) != entry["bytes"]:
            return f"{path.name}: {size} bytes, its manifest says {entry['bytes']}"
        if not is_intact(path, entry):
            return f"{path.name}: its bytes are not those that were written"
    except OSError as error:
        return f"{path.name}: {error.strerror or error}"
    return None
