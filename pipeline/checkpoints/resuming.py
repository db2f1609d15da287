"""Where a run goes on: its newest checkpoint whose every file has the bytes that its manifest promises.

Each rank reads its part of the files once, so that a thousand ranks read a checkpoint once between them; which
checkpoint it is, rank 0 decides for all.
"""

import json
import logging
import os
import shutil
from pathlib import Path

from torch.distributed import Store

from pipeline.checkpoints.files import is_intact
from pipeline.checkpoints.mirror import CheckpointMirror
from pipeline.errors import FaultError, InputError
from pipeline.meeting import in_the_words_of_rank_0
from pipeline.rank import Rank
from pipeline.run_directory import FORMAT_VERSION, Checkpoint

log = logging.getLogger(__name__)


def newest_intact_checkpoint(me: Rank, store: Store, mirror: str | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies, the same on all ranks; None where there is none at all. Collective.

    Where the run directory has none, the newest of the `mirror` (a URL) is brought there. Damaged ones are named in
    the log and set aside as `step-N.damaged`. InputError where all are damaged: to begin again from nothing is not for
    a program to decide. FaultError where the mirror does not answer.
    """
    found = _names_or_fault(me, mirror) if me.is_first else None
    names, fault = in_the_words_of_rank_0(me, store, found, lambda said: said[0])
    if fault:
        raise FaultError(fault)
    damaged: list[Path] = []
    for name in names:
        directory = me.run.checkpoints / name
        faults = faults_of_share(directory, me.rank, me.world_size)
        faults = in_the_words_of_rank_0(me, store, faults, lambda said: [fault for part in said for fault in part])
        if not faults:
            if me.is_first:
                _set_aside(damaged)
            return Checkpoint(directory, json.loads((directory / "manifest.json").read_text()))
        damaged.append(directory)
        if me.is_first:
            log.warning("%s is damaged, falling back to the one before: %s", directory, faults[0])
    if names:
        raise InputError(
            f"{me.run.checkpoints}: none of its {len(names)} checkpoints is intact, of the oldest: {faults[0]}; bring "
            "one back from a copy, or remove the directory to begin from the first step"
        )
    return None


def _names_or_fault(me: Rank, mirror: str | None) -> tuple[list[str], str | None]:
    """The checkpoints there are, newest first; or why the mirror, which may have some, could not be asked."""
    try:
        if mirror and not me.run.checkpoint_directories():
            CheckpointMirror(mirror, me.run).fetch_newest()
    except (FaultError, InputError, OSError) as error:
        return [], f"checkpoint.mirror {mirror}: {error}"
    return [directory.name for directory in me.run.checkpoint_directories()], None


def _set_aside(damaged: list[Path]) -> None:
    """Rename them, so that nobody takes them for checkpoints; they go when a newer one has been committed."""
    for directory in damaged:
        aside = directory.with_name(f"{directory.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(directory, aside)


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
