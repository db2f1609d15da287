"""Which checkpoints of a run stay on disk, and whether the disk has room for them."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pipeline.config.checkpoint import CheckpointConfig
from pipeline.errors import InputError
from pipeline.run_directory import Checkpoint, RunDirectory

Best = tuple[str, Literal["max", "min"]]  # a metric of the manifest's `validation`, and which of two is better


def best_checkpoint(checkpoints: list[Checkpoint], best: Best | None) -> Checkpoint | None:
    """The one whose validation was best, the later of equals; None where none has the metric."""
    if best is None:
        return None
    name, direction = best
    scored = [one for one in checkpoints if name in one.manifest.get("validation", {})]
    sign = 1 if direction == "max" else -1
    return max(scored, key=lambda one: (sign * one.manifest["validation"][name], one.step), default=None)


def prune_checkpoints(run: RunDirectory, config: CheckpointConfig, best: Best | None = None) -> list[str]:
    """Remove what need not stay, and what killed attempts left; the names of the checkpoints removed. Rank 0 only.

    To be called behind a commit: the newest stays, whatever the config says.
    """
    committed, every = run.committed_checkpoints(), config.keep_every_steps
    kept = {one.directory for one in committed[: config.keep]}
    kept |= {one.directory for one in committed if every and one.step % every == 0}
    kept |= {one.directory for one in [best_checkpoint(committed, best)] if one}
    removed = [one.directory for one in committed if one.directory not in kept]
    for directory in removed:
        going = directory.rename(directory.with_name(f"{directory.name}.removed.partial"))  # a kill leaves no half
        shutil.rmtree(going)
    current = run.current_attempt()
    for left in [*run.checkpoints.glob("step-*.partial"), *run.checkpoints.glob("step-*.damaged")]:
        if not left.name.endswith(f".attempt-{current:02d}.partial"):
            shutil.rmtree(left, ignore_errors=True)
    return [directory.name for directory in removed]


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename them, so that nobody takes them for checkpoints; they go when a newer one has been committed."""
    for directory in damaged:
        aside = directory.with_name(f"{directory.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(directory, aside)


def require_room(run: RunDirectory, config: CheckpointConfig, checkpoint_bytes: int, best: Best | None = None) -> None:
    """InputError where the disk cannot hold the checkpoints that stay, and the one being written."""
    count = config.keep + 1 + (best is not None)
    held = sum(entry["bytes"] for one in run.committed_checkpoints() for entry in one.manifest["files"].values())
    needed, free = count * checkpoint_bytes - held, shutil.disk_usage(run.path).free
    if needed > free:
        raise InputError(
            f"{run.checkpoints}: {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} GiB needed for {count} checkpoints "
            f"of {checkpoint_bytes / 2**30:.2f} GiB (checkpoint.keep={config.keep}, and one being written); free some "
            "space, lower checkpoint.keep, or give a run directory on a larger disk"
        )
