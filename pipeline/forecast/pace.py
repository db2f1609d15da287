"""How long a run takes, learned from the runs of the same home: what they took of what their arithmetic promised.

A plan promises samples x arithmetic per image / (speed x ranks), at a speed that is stated and nobody measured. What
past runs took of that tells the rest: their ratio as a line over the arithmetic of a step (small steps are less
efficient), with what it scatters. Torch-free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.forecast.law import COVERS, Interval
from pipeline.forecast.past import PastRun
from pipeline.forecast.regression import DRAWS, Belief, fit_lines
from pipeline.words import duration_in_words

ACCELERATOR_FLOPS = 1e14  # per second: about what an A100 reaches at training a ViT
PROCESSOR_FLOPS = 1e11  # per second and rank, in fp32 on a few cores
START_SECONDS = 20.0  # that starting and ending take on two cores; of larger machines it says nothing
LEAST_RUNS = 3  # of fewer no interval follows
WIDEST = 100.0  # from an interval's low to its high; a wider one, of runs that were nothing like it, says nothing
RATIO = Belief(mean=(0.0, -0.1), deviation=(3.0, 0.2), scatter=0.1)


def planned_seconds(plan: Mapping[str, Any]) -> float:
    """What the arithmetic of a plan takes at the stated speed."""
    speed = ACCELERATOR_FLOPS if plan["accelerators_per_node"] else PROCESSOR_FLOPS
    return plan["steps"]["samples"] * plan["training_flops_per_image"] / (speed * plan["world_size"])


def _log_step(plan: Mapping[str, Any]) -> float:
    """Log of a rank's arithmetic in a step."""
    return float(np.log(plan["batches"]["global_batch_size"] * plan["training_flops_per_image"] / plan["world_size"]))


@dataclass(frozen=True)
class Pace:
    """What past runs took of their plans from first step to last: ratios (N,), the logs of a step's arithmetic (N,),
    and the seconds that starting and ending took."""

    ratios: np.ndarray
    log_steps: np.ndarray
    around: float

    @property
    def in_words(self) -> str:
        """`past runs here took 1.12 (0.98–1.31) times their plan: 5 runs of this profile, and 20 s to start and end`"""
        low, middle, high = (f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
                             for ratio in np.quantile(self.ratios, [0.1, 0.5, 0.9]))  # fmt: skip
        runs = f"{len(self.ratios)} run{'' if len(self.ratios) == 1 else 's'} of this profile"
        around = f"and {duration_in_words(self.around)} to start and end"
        return f"past runs here took {middle} ({low}–{high}) times their plan: {runs}, {around}"

    def hours(self, plan: Mapping[str, Any]) -> Interval | None:
        """Of a run like these; None where they are too few to say how much they scatter, or too unlike it."""
        if len(self.ratios) < LEAST_RUNS:
            return None
        centre = self.log_steps.mean()
        rows = np.column_stack([np.ones(len(self.ratios)), self.log_steps - centre])
        lines = fit_lines(rows, np.log(self.ratios), np.zeros(len(self.ratios)), RATIO)
        random = np.random.default_rng(0)
        weights, scatter = lines.draws(DRAWS, random)
        ratio = np.exp(weights @ [1.0, _log_step(plan) - centre] + scatter * random.standard_normal(DRAWS))
        hours = (planned_seconds(plan) * ratio + self.around) / 3600
        low, middle, high = np.quantile(hours, [(1 - COVERS) / 2, 0.5, (1 + COVERS) / 2])
        return Interval(float(middle), float(low), float(high)) if high <= WIDEST * low else None


def learned_pace(runs: Sequence[PastRun], place: tuple[Any, ...]) -> Pace | None:
    """From the past runs of one place; None where there are none."""
    found = []
    for one in runs:
        if one.place == place and one.taken is not None:
            planned, taken = planned_seconds(one.plan), one.taken
            found.append((taken.training / planned, _log_step(one.plan), taken.around))
    if not found:
        return None
    ratios, log_steps, around = (np.array(column) for column in zip(*found, strict=True))
    return Pace(ratios, log_steps, float(np.median(around)))


@dataclass(frozen=True)
class Expectation:
    """What several runs of one place are expected to take, all of them by the same measure: by the pace of past runs
    where that tells of each, else by their arithmetic. `known` is how many past runs there are."""

    pace: Pace | None
    known: int

    def hours(self, plan: Mapping[str, Any]) -> float:
        told = None if self.pace is None else self.pace.hours(plan)
        return (planned_seconds(plan) + START_SECONDS) / 3600 if told is None else told.value

    @property
    def in_words(self) -> str:
        if self.pace is not None:
            return self.pace.in_words
        if self.known >= LEAST_RUNS:
            here = f"{self.known} past runs here, too unlike these"
        elif self.known:
            here = f"{self.known} past run{'' if self.known == 1 else 's'} here, and {LEAST_RUNS} are needed"
        else:
            here = "no past runs"
        stated = f"their arithmetic at a stated speed, and {START_SECONDS:.0f} s each to start and end"
        return f"{stated}; {here} to learn from"


def expectation(
    runs: Sequence[PastRun], place: tuple[Any, ...], plans: Sequence[Mapping[str, Any]]
) -> Expectation:  # fmt: skip
    """Of the past runs of one place, for all of `plans` by one measure."""
    pace = learned_pace(runs, place)
    known = 0 if pace is None else len(pace.ratios)
    tells = pace is not None and all(pace.hours(plan) is not None for plan in plans)
    return Expectation(pace if tells else None, known)
