"""Which checkpoints of a run stay on disk, and whether the disk has room for them."""

import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pipeline.config.checkpoint import CheckpointConfig
from pipeline.config.plan import StepPlan
from pipeline.errors import InputError
from pipeline.run_directory import Checkpoint, RunDirectory, read_json
from pipeline.words import bytes_in_words

Best = tuple[str, Literal["max", "min"]]  # a metric of the manifest's `validation`, and which of two is better


def _merit(scores: Mapping[str, float], best: Best | None) -> float:
    """The score that decides, turned so that more is better; minus infinity where there is none, or it is no number."""
    if best is None:
        return -math.inf
    name, direction = best
    value = scores.get(name, math.nan) * (1 if direction == "max" else -1)
    return -math.inf if math.isnan(value) else value


def best_checkpoint(checkpoints: list[Checkpoint], best: Best | None) -> Checkpoint | None:
    """The one whose validation was best, the later of equals; None where none has the metric."""
    merits = {one.step: _merit(one.manifest.get("validation", {}), best) for one in checkpoints}
    scored = [one for one in checkpoints if merits[one.step] > -math.inf]
    return max(scored, key=lambda one: (merits[one.step], one.step), default=None)


class BestSoFar:
    """Tells whether scores are the best that a run has had, in this attempt or in the `checkpoints` of those before."""

    def __init__(self, checkpoints: list[Checkpoint], best: Best | None):
        self.best, self.metric = best, best and best[0]
        self._merit = max((_merit(one.manifest.get("validation", {}), best) for one in checkpoints), default=-math.inf)

    def take(self, scores: Mapping[str, float]) -> bool:
        merit, before = _merit(scores, self.best), self._merit
        self._merit = max(merit, before)
        return merit >= before and merit > -math.inf


def _step_plan(run: RunDirectory) -> StepPlan | None:
    plan = read_json(run.plan_file)
    return StepPlan(**plan["steps"]) if plan else None


def _last_at_constant_rate(run: RunDirectory, newest_first: list[Checkpoint]) -> Checkpoint | None:
    """The one that a run which cools down can be made longer from; None of any other run."""
    plan = _step_plan(run)
    if plan is None or not plan.cooldown_samples:
        return None
    return next((one for one in newest_first if one.step <= plan.cooldown_begins), None)


def prune_checkpoints(run: RunDirectory, config: CheckpointConfig, best: Best | None = None) -> list[str]:
    """Remove what need not stay, and what killed attempts left; the names of the checkpoints removed. Rank 0 only.

    To be called behind a commit: the newest stays, whatever the config says.
    """
    committed, every = run.committed_checkpoints(), config.keep_every_steps
    kept = {one.directory for one in committed[: config.keep]}
    kept |= {one.directory for one in committed if every and one.step % every == 0}
    kept |= {one.directory for one in (best_checkpoint(committed, best), _last_at_constant_rate(run, committed)) if one}
    removed = [one.directory for one in committed if one.directory not in kept]
    for directory in removed:
        going = directory.rename(directory.with_name(f"{directory.name}.removed.partial"))  # a kill leaves no half
        shutil.rmtree(going)
    for aside in run.checkpoints.glob("step-*.cooled"):  # of a run made longer, once it has come as far again
        if committed and int(aside.name[len("step-") :].partition(".")[0]) <= committed[0].step:
            shutil.rmtree(aside, ignore_errors=True)
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


def require_room(
    run: RunDirectory, config: CheckpointConfig, checkpoint_bytes: int, weights_bytes: int = 0,
    best: Best | None = None,
) -> None:  # fmt: skip
    """InputError where the disk cannot hold the checkpoints that stay, the one being written, and weights at a cadence.

    `checkpoint_bytes` and `weights_bytes`: of one each.
    """
    plan = _step_plan(run)
    steps, cools = (plan.steps, plan.cooldown_samples > 0) if plan else (0, False)
    at_intervals = steps // config.keep_every_steps if config.keep_every_steps else 0
    count = config.keep + 1 + (best is not None) + cools + at_intervals
    held = sum(entry["bytes"] for one in run.committed_checkpoints() for entry in one.manifest["files"].values())
    # Old ones go behind a commit only, so there must be room for one more, whatever is held.
    needed = max(count * checkpoint_bytes - held, checkpoint_bytes)
    exports = steps // config.weights_every_steps if config.weights_every_steps else 0
    written = sum(file.stat().st_size for file in run.weights.glob("step-*/model.safetensors"))
    needed += max(exports * weights_bytes - written, 0)
    free = shutil.disk_usage(run.path).free
    if needed > free:
        kept, lower = f"checkpoint.keep={config.keep}", "lower checkpoint.keep"
        if at_intervals:
            kept += f", checkpoint.keep_every_steps={config.keep_every_steps}"
            lower += ", raise checkpoint.keep_every_steps"
        also = ""
        if exports:
            also = f" and {exports} times the weights (checkpoint.weights_every_steps={config.weights_every_steps})"
            lower += ", raise checkpoint.weights_every_steps"
        raise InputError(
            f"{run.checkpoints}: {bytes_in_words(free)} free, {bytes_in_words(needed)} needed for {count} checkpoints "
            f"of {bytes_in_words(checkpoint_bytes)} ({kept}, and one being written){also}; free some space, {lower}, "
            "or give a run directory on a larger disk"
        )
