"""What is said of a run before it is submitted: a forecast, and bands for its health. Torch-free.

Written once, at preparation, from what the home knows then: `RUN/forecast.json` and `RUN/bands.json`. A run that has
begun keeps what was said, so that it can be held against what came.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.training import TrainingConfig
from pipeline.forecast.bands import as_file, bands
from pipeline.forecast.grading import FILE, forecast_in_words, planned
from pipeline.forecast.ladder import FOLDER, Ladder, ladders, size_of, why_not
from pipeline.forecast.law import Interval, TooFew
from pipeline.forecast.pace import learned_pace
from pipeline.forecast.past import past_runs, place_of
from pipeline.health.bands import FILE as BANDS
from pipeline.run_directory import RunDirectory, read_json, write_json

OF_LADDERS = "rungs of ladder"  # in the basis of bands that are ours


@dataclass
class Outlook:
    """The two files as they will be, empty where nothing can be said; and lines that a person should read."""

    forecasts: dict[str, dict[str, Any]] = field(default_factory=dict)
    basis: list[str] = field(default_factory=list)
    bands: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    of: dict[str, Any] = field(default_factory=dict)  # what was planned: another length or placement is another run

    @property
    def in_words(self) -> list[str]:
        """What is forecast, in one line with what it is based on; none where nothing is."""
        return [forecast_in_words(self.forecasts, self.basis)] if self.forecasts else []

    def write(self, run: RunDirectory) -> None:
        """Into a run that has not begun: what an earlier preparation said is said anew."""
        if self.forecasts:
            said = {"format_version": 1, "basis": "; ".join(self.basis)} | self.of
            write_json(run.path / FILE, said | {"forecasts": self.forecasts})
        else:
            (run.path / FILE).unlink(missing_ok=True)
        if self.bands:
            write_json(run.path / BANDS, self.bands)
        elif OF_LADDERS in str((read_json(run.path / BANDS) or {}).get("basis")):
            (run.path / BANDS).unlink()  # of a ladder that is gone; those of others stay


def outlook(
    config: TrainingConfig, plan: Mapping[str, Any], home: Path, profile: Mapping[str, Any], path: Path
) -> Outlook:
    """Of a prepared training that will be at `path`. A rung of a ladder is told its time, and nothing of its score; a
    rehearsal is told nothing."""
    if plan.get("rehearsal"):
        return Outlook()
    found = Outlook(of=planned(plan))
    pace = learned_pace(past_runs(home), place_of(plan, profile))
    hours = pace.hours(plan) if pace is not None else None
    if hours is not None:
        found.forecasts["hours"] = _entry(hours, "hours")
        found.basis.append(f"{len(pace.ratios)} past runs of this profile (time)")
        devices = max(1, plan["accelerators_per_node"]) * plan["nodes"]
        if per_hour := devices * profile.get("price_per_device_hour", 0.0):
            price = Interval(*(per_hour * bound for bound in hours))
            found.forecasts["cost"] = _entry(price, "price") | {"per_hour": per_hour}
    if not path.is_relative_to(home / FOLDER):
        _add_ladder(found, config, plan, home)
    return found


def _entry(interval: Interval, unit: str) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "unit": unit}


def _add_ladder(found: Outlook, config: TrainingConfig, plan: Mapping[str, Any], home: Path) -> None:
    """What the newest ladder says that speaks of this run; where none does, why not the newest of its objective."""
    passed_over: list[str] = []
    for ladder in ladders(home):
        if ladder.settings["objective"]["kind"] != config.objective.kind:
            continue
        if (reason := why_not(ladder, config, plan)) is None:
            return _say(found, ladder, plan["steps"]["samples"], size_of(config, plan))
        passed_over.append(f"ladder {ladder.directory.name} is not used: {reason}")
    found.notes += passed_over[:1]


def _say(found: Outlook, ladder: Ladder, samples: int, parameters: int) -> None:
    """What a ladder says of a run that sees so many images with so many parameters."""
    target, name = (samples, parameters), ladder.directory.name
    missing = [rung.name for rung in ladder.rungs if rung.value is None]
    without = f" without {', '.join(missing)}" if missing else ""
    try:
        entry = _entry(ladder.forecast(*target), "share" if ladder.score.name == "accuracy" else "loss")
        found.forecasts = {ladder.score.name: entry | {"metric": ladder.score.metric}} | found.forecasts
        found.basis.insert(0, f"{len(ladder.done)} {OF_LADDERS} {name}{without} ({ladder.score.name})")
    except TooFew as error:
        found.notes.append(f"ladder {name}{without}: no forecast: {error}")
    if band := bands(ladder.done, *target):
        found.bands = as_file(band, f"{len(ladder.done)} {OF_LADDERS} {name}{without}")
