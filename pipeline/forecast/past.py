"""The finished trainings of a home, the newest first, as far as a forecast learns from them. Torch-free.

A home may hold ten thousand runs: the newest are looked at, and of each a few small files are read.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.recipe import read_yaml
from pipeline.errors import InputError
from pipeline.run_directory import Attempt, RunDirectory, read_json

MOST_RUNS = 100  # that are learned from
MOST_LOOKED_AT = 2000  # directories, most of which are evaluations, registrations and runs that are not done
TAIL_BYTES = 1 << 14  # of a ledger, for its last line
HARDWARE = (  # keys of profiles that choose machines: an A100 takes another time than an H100
    "kind", "partition", "constraint", "gres", "directives", "context", "queue", "node_selector", "affinity",
    "accelerator_resource", "accelerator_gib",
)  # fmt: skip


@dataclass(frozen=True)
class Taken:
    """Wall-clock seconds of a run over all its attempts: `whole`, and from each first step to its last, `training`."""

    whole: float
    training: float

    @property
    def around(self) -> float:
        """What starting and ending took."""
        return max(0.0, self.whole - self.training)


@dataclass(frozen=True)
class PastRun:
    """A training that is done: what was planned, what came of it, where it ran, and what it took, if that is known."""

    run: RunDirectory
    plan: Mapping[str, Any]
    result: Mapping[str, Any]
    profile: Mapping[str, Any]
    taken: Taken | None

    @property
    def place(self) -> tuple[Any, ...]:
        """What runs must share for the time of one to say something of another's."""
        return place_of(self.plan, self.profile)

    @property
    def objective(self) -> str | None:
        """Its kind; read when it is asked for, as a config is long."""
        try:
            return (read_yaml(self.run.config_file).get("objective") or {}).get("kind")
        except (OSError, AttributeError, InputError):
            return None


def place_of(plan: Mapping[str, Any], profile: Mapping[str, Any]) -> tuple[Any, ...]:
    """The machines that a profile asks for, ranks, accelerators and precision."""
    hardware = tuple((key, json.dumps(profile[key], sort_keys=True)) for key in HARDWARE if profile.get(key))
    return hardware, plan.get("world_size"), plan.get("accelerators_per_node"), plan.get("precision")


def past_runs(home: Path) -> list[PastRun]:
    """The newest finished trainings of a home, at most `MOST_RUNS`; rehearsals are none of them.

    What cannot be read is no past run: whoever asks wants to train, not to mend an old directory.
    """
    found = []
    for path in _newest(home / "runs"):
        try:
            written = os.stat(path / "result.json").st_mtime_ns
        except OSError:
            continue
        if (past := _past_run(path, written)) is not None:
            found.append(past)
            if len(found) == MOST_RUNS:
                break
    return found


@lru_cache(maxsize=MOST_LOOKED_AT)
def _past_run(path: Path, written: int) -> PastRun | None:
    """The run at `path`, whose result was written at that time: a sweep that prepares hundreds reads each once."""
    run = RunDirectory(path)
    try:
        plan = read_json(run.plan_file)
        if not plan or "steps" not in plan or plan.get("rehearsal"):
            return None
        result = read_json(run.result_file)
        return PastRun(run, plan, result, dict(read_yaml(run.profile_file)), seconds_taken(run))
    except (OSError, ValueError, AttributeError, TypeError, InputError):
        return None


def _newest(folder: Path) -> list[Path]:
    """The newest directories of runs, and links to such, in a folder."""
    try:
        with os.scandir(folder) as entries:
            known = [(_age(entry), entry.path) for entry in entries]
    except OSError:
        return []
    return [Path(path) for _, path in sorted(known, reverse=True)[:MOST_LOOKED_AT]]


def _age(entry: os.DirEntry) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0  # a link whose run is gone


def seconds_taken(run: RunDirectory) -> Taken | None:
    """By the heartbeats and the ledgers of its attempts; None where they do not say."""
    whole = training = 0.0
    for number in range(1, run.last_attempt() + 1):
        attempt = run.attempt(number)
        try:
            beat = read_json(attempt.heartbeat(0)) or {}
            whole += max(0.0, beat["time"] - beat["started"])
            training += training_seconds(attempt)
        except (KeyError, TypeError, ValueError, OSError):
            continue
    return Taken(max(whole, training), training) if training > 0 else None


def training_seconds(attempt: Attempt) -> float:
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
