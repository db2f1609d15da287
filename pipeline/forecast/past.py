"""The finished trainings of a home, the newest first, as far as a forecast learns from them. Torch-free.

A home may hold ten thousand runs: the newest are looked at, and of each a few small files are read.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.run_directory import Attempt, RunDirectory, read_json

MOST_RUNS = 200  # that are looked at
TAIL_BYTES = 1 << 14  # of a ledger, for its last line


@dataclass(frozen=True)
class PastRun:
    """A training that is done: what was planned, what came of it, and where it ran."""

    run: RunDirectory
    plan: Mapping[str, Any]
    result: Mapping[str, Any]
    profile: str  # its kind: local, slurm, kubernetes

    @property
    def place(self) -> tuple[Any, ...]:
        """What runs must share for the time of one to say something of another's."""
        return place_of(self.plan, self.profile)


def place_of(plan: Mapping[str, Any], profile_kind: str) -> tuple[Any, ...]:
    """Kind of profile, ranks, accelerators and precision."""
    return profile_kind, plan.get("world_size"), plan.get("accelerators_per_node"), plan.get("precision")


def past_runs(home: Path, *, without: Path | None = None) -> list[PastRun]:
    """The finished trainings among the newest `MOST_RUNS` of a home; rehearsals and `without` are none of them.

    What cannot be read is no past run: whoever asks wants to train, not to mend an old directory.
    """
    found = []
    for path in _newest(home / "runs"):
        run = RunDirectory(path)
        if without is not None and run.path.resolve() == without.resolve():
            continue
        try:
            result, plan = read_json(run.result_file), read_json(run.plan_file)
            if not result or not plan or "steps" not in plan or plan.get("rehearsal"):
                continue
            kind = (yaml.safe_load(run.profile_file.read_text()) or {}).get("kind", "local")
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            continue
        found.append(PastRun(run, plan, result, kind))
    return found


def _newest(folder: Path) -> list[Path]:
    """The newest directories of runs, and links to such, in a folder."""
    try:
        with os.scandir(folder) as entries:
            known = [(_age(entry), entry.path) for entry in entries]
    except OSError:
        return []
    return [Path(path) for _, path in sorted(known, reverse=True)[:MOST_RUNS]]


def _age(entry: os.DirEntry) -> float:
    try:
        return entry.stat(follow_symlinks=True).st_mtime
    except OSError:
        return 0.0  # a link whose run is gone


@dataclass(frozen=True)
class Taken:
    """Wall-clock seconds of a run over all its attempts: `whole`, and from each first step to its last, `training`."""

    whole: float
    training: float

    @property
    def around(self) -> float:
        """What starting and ending took."""
        return max(0.0, self.whole - self.training)


def seconds_taken(run: RunDirectory) -> Taken | None:
    """By the heartbeats and the ledgers of its attempts; None where they do not say."""
    whole = training = 0.0
    for number in range(1, run.last_attempt() + 1):
        attempt = run.attempt(number)
        try:
            beat = read_json(attempt.heartbeat(0)) or {}
            whole += max(0.0, beat["time"] - beat["started"])
            training += _training_seconds(attempt)
        except (KeyError, TypeError, ValueError, OSError):
            continue
    return Taken(max(whole, training), training) if training > 0 else None


def _training_seconds(attempt: Attempt) -> float:
    """From the first line of a ledger to its last, and as much for the first step as for another."""
    if not attempt.ledger.is_file():
        return 0.0
    with open(attempt.ledger, "rb") as file:
        first = json.loads(file.readline() or "{}")
        file.seek(max(0, attempt.ledger.stat().st_size - TAIL_BYTES))
        whole = [line for line in file.read().splitlines(keepends=True) if line.startswith(b"{") and line[-1:] == b"\n"]
    last = json.loads(whole[-1]) if whole else first
    steps = last.get("step", 0) - first.get("step", 0)
    if steps <= 0:
        return float(first.get("perf/last_step_seconds", 0.0))
    return (last["time"] - first["time"]) * (steps + 1) / steps
