"""What a run has cost so far, over all its attempts, and when its budget is spent. Torch-free."""

import time
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.forecast.past import training_seconds
from pipeline.run_directory import Attempt, RunDirectory, read_json
from pipeline.words import number_in_words


def rank_hours(attempt: Attempt) -> float:
    """Hours of all ranks of an attempt, by the heartbeats of its supervisors: to some seconds, also if it was killed.

    A rank has one accelerator, so these are GPU-hours where there are GPUs.
    """
    beats = [read_json(path) for path in attempt.path.glob("heartbeat/node-*")]
    if not beats:
        return _rank_hours_in_sequence(attempt)
    return sum((beat["time"] - beat.get("started", beat["time"])) * len(beat["ranks"]) for beat in beats) / 3600


def _rank_hours_in_sequence(attempt: Attempt) -> float:
    """By the ledger, of an attempt that had no supervisor: one of a sequence, whose own hours have the start-up too."""
    try:
        plan = read_json(RunDirectory(attempt.path.parents[1]).plan_file) or {}
        return training_seconds(attempt) * plan["world_size"] / 3600
    except (KeyError, TypeError, ValueError, OSError):
        return 0.0


def hours_of(run: RunDirectory, *, before: int | None = None) -> float:
    """Rank-hours of all attempts, or of those `before` one of them."""
    return sum(rank_hours(run.attempt(number)) for number in range(1, before or run.last_attempt() + 1))


def require_hours_left(run: RunDirectory, hours: float | None) -> None:
    """InputError where nothing of the budget is left for another attempt. One that still runs minds it itself."""
    newest = run.last_attempt()
    if hours is not None and newest and run.attempt(newest).verdict() is not None:
        _require_left(run, hours, hours_of(run))


def _require_left(run: RunDirectory, hours: float | None, used: float) -> None:
    if hours is not None and used >= hours:
        raise InputError(
            f"{run.config_file}: budget_gpu_hours: {hours:g} and {number_in_words(used)} are used; to go on say "
            f"`vit resume {run.path} --set budget_gpu_hours=N` with a larger N"
        )


@dataclass(frozen=True)
class Budget:
    """Hours that a run may cost, what it had cost before this attempt, and since when `world_size` ranks add to it."""

    hours: float | None
    hours_before: float
    world_size: int
    started: float

    @classmethod
    def of(cls, run: RunDirectory, attempt: Attempt, hours: float | None, world_size: int) -> "Budget":
        """InputError where the attempts before have left nothing of it."""
        beat = read_json(attempt.path / "heartbeat" / "node-000") or {}
        before = 0.0 if hours is None else hours_of(run, before=attempt.number)
        _require_left(run, hours, before)
        return cls(hours, before, world_size, beat.get("started", time.time()))

    @property
    def used(self) -> float:
        return self.hours_before + (time.time() - self.started) * self.world_size / 3600

    @property
    def is_spent(self) -> bool:
        return self.hours is not None and self.used >= self.hours

    @property
    def why_stopped(self) -> str:
        """What a rank says that stops now."""
        if self.is_spent:
            return f"budget_gpu_hours {self.hours:g} is spent ({number_in_words(self.used)} used): stopped"
        return "stopped on request"
