"""The ledgers of a run as curves: every attempt, steps that were done again only once, and thinned so that a run of
millions of steps is read in seconds. Torch-free."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.run_directory import RunDirectory

PARSED = 4000  # lines of a ledger that are read beside those with scores; of longer ones, one of every few
POINTS = 240  # of a curve: more steps share one
RARE = (b'"validation/', b'"health/')  # what is in few lines, each of which counts
SKIPPED = b'"train/skipped": 1'


class Curve(NamedTuple):
    """A metric over steps; where several steps share a point, their mean, and the least and greatest of them."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]
    last: float  # of the last step itself


class Story(NamedTuple):
    """What the ledgers tell. `steps` is how many were counted, `skipped` of how many the weights were left alone."""

    curves: dict[str, Curve]
    steps: int
    skipped: int
    last_step: int
    thinned: bool


def read_story(run: RunDirectory) -> Story:
    """Of all attempts: what a later one did again counts as that one did it. Damaged lines are passed over."""
    attempts = [run.attempt(number) for number in range(1, run.last_attempt() + 1)]
    begun = {path: _first_step(path) for attempt in attempts if (path := attempt.ledger).is_file()}
    begun = {path: first for path, first in begun.items() if first is not None}
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    steps = skipped = last_step = 0
    thinned = False
    for path, end in zip(begun, later_begins(list(begun.values())), strict=True):
        told = _Told()
        for line in told.lines(path):
            if (step := line["step"]) >= end:
                continue
            last_step = max(last_step, int(step))
            for key, value in line.items():
                if "/" in key and isinstance(value, int | float) and math.isfinite(value):
                    points[key].append((step, value))
        steps, skipped, thinned = steps + told.count, skipped + told.skipped, thinned or told.every > 1
    return Story({key: thin(found) for key, found in points.items()}, steps, skipped, last_step, thinned)


def later_begins(begun: list[int]) -> list[float]:
    """Of each attempt, the step from which on a later one tells."""
    ends, nearest = [], math.inf
    for first in reversed(begun):
        ends.append(nearest)
        nearest = min(nearest, first)
    return ends[::-1]


def thin(points: Iterable[tuple[float, float]], most: int = POINTS) -> Curve:
    """At most `most` points, evenly over the steps."""
    ordered = sorted(points)
    if len(ordered) <= most:
        steps, values = [step for step, _ in ordered], [value for _, value in ordered]
        return Curve(steps, values, values, values, values[-1])
    low, high = ordered[0][0], ordered[-1][0]
    bins: list[list[tuple[float, float]]] = [[] for _ in range(most)]
    for step, value in ordered:
        bins[min(most - 1, int((step - low) / (high - low or 1) * most))].append((step, value))
    curve = Curve([], [], [], [], ordered[-1][1])
    for several in filter(None, bins):
        values = [value for _, value in several]
        curve.steps.append(several[-1][0])
        curve.means.append(sum(values) / len(values))
        curve.lows.append(min(values))
        curve.highs.append(max(values))
    return curve


class _Told:
    """Reads one ledger: all lines are counted, few are parsed."""

    def __init__(self) -> None:
        self.count = self.skipped = 0
        self.every = self.every_rare = 1

    def lines(self, path: Path) -> Iterator[dict[str, Any]]:
        self.every = max(1, _expected_lines(path) // PARSED)
        rare, last = 0, b""
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                self.count += 1
                self.skipped += SKIPPED in line
                last = line
                wanted = number % self.every == 0
                if not wanted and any(word in line for word in RARE):
                    rare += 1
                    wanted = rare % self.every_rare == 0
                    if rare > PARSED * self.every_rare:
                        self.every_rare *= 2
                if wanted and (found := parsed_line(line)):
                    last = b""
                    yield found
        if last and (found := parsed_line(last)):
            yield found


def parsed_line(line: bytes) -> dict[str, Any] | None:
    """A line of a ledger; None for the half line that a killed process left, and for what is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    is_told = isinstance(found, dict) and isinstance(found.get("step"), int | float)
    return found if is_told else None


def _expected_lines(path: Path) -> int:
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    return path.stat().st_size * max(1, head.count(b"\n")) // max(1, len(head))


def _first_step(path: Path) -> int | None:
    with open(path, "rb") as file:
        for line in file:
            if found := parsed_line(line):
                return int(found["step"])
    return None
