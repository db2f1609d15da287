"""Forecasts held against what came: `RUN/forecast.json`, and `forecast` in `RUN/result.json`. Torch-free.

What a run took is known at its end, and a supervised one's accuracy too; a model that learned without labels is
graded when it is evaluated by the forecast's protocol on the forecast's data. Nothing is graded against a partial
run.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.forecast.past import PastRun, seconds_taken
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.words import duration_in_words

FILE = "forecast.json"
FORECAST, OUTCOME = "forecast.", "outcome."  # a registered version's tags begin so, with the name of a forecast behind
log = logging.getLogger(__name__)
Graded = dict[str, dict[str, Any]]


def planned(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a forecast is of, as `forecast.json` has it beside the forecasts."""
    return {
        "data_fingerprint": plan["data"]["fingerprint"], "steps": plan["steps"]["steps"],
        "world_size": plan["world_size"],
    }  # fmt: skip


def is_of(said: Mapping[str, Any], run: RunDirectory) -> bool:
    """Whether a forecast is of the run as it is planned now; where it is of another length, data or ranks, as after
    `vit resume --set`, that is told."""
    try:
        now = planned(run.plan())
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: the forecast is not graded: %s", run.path / FILE, error)
        return False
    different = [key for key, value in now.items() if said.get(key) != value]
    if different:
        log.warning("%s: the forecast is not graded: %s is another than when it was made", run.path / FILE,
                    ", ".join(different))  # fmt: skip
    return not different


def forecast_of(run: RunDirectory) -> dict[str, Any]:
    """What `RUN/forecast.json` says, of its forecasts those that can be read; {} where there is none. What is damaged
    is told and left out: a training does not break at its last act by what was once said of it."""
    file = run.path / FILE
    try:
        said = read_json(file)
        if said is None:
            return {}
        forecasts = {name: one for name, one in said["forecasts"].items() if _is_whole(file, name, one)}
        return said | {"forecasts": forecasts} if forecasts else {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        log.warning("%s: not graded: %s", file, error if isinstance(error, OSError | ValueError) else "no forecasts")
        return {}


def _is_whole(file: Path, name: str, one: Any) -> bool:
    found = one if isinstance(one, dict) else {}
    numbers = ("value", "low", "high", *(key for key in ("per_hour",) if key in found))
    wrong = [key for key in numbers if not _is_number(found.get(key))]
    wrong += [key for key in ("metric",) if not isinstance(found.get(key, ""), str)]
    if wrong:
        said = f"{wrong[0]} is {found.get(wrong[0])!r}" if found else f"it is {one!r}"
        log.warning("%s: %s is not graded: %s; there must be value, low and high, as numbers", file, name, said)
    return not wrong


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def graded(forecasts: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, float]) -> Graded:
    """Each forecast beside its outcome, of those whose outcome is known."""
    return {
        name: {"value": one["value"], "low": one["low"], "high": one["high"], "outcome": outcomes[name],
               "inside": bool(one["low"] <= outcomes[name] <= one["high"])}
        for name, one in forecasts.items() if name in outcomes
    }  # fmt: skip


def grade_at_end(run: RunDirectory, result: Mapping[str, Any]) -> Graded:
    """Of a training that has reached its last step: hours, cost, and what it scored itself."""
    said = forecast_of(run)
    if not said or not is_of(said, run):
        return {}
    forecasts, outcomes = said["forecasts"], {}
    if (taken := seconds_taken(run)) is not None:
        outcomes["hours"] = taken.whole / 3600
        outcomes["cost"] = outcomes["hours"] * forecasts.get("cost", {}).get("per_hour", 0.0)
    for name in ("accuracy", "loss"):
        value = scored(result, forecasts.get(name, {}).get("metric"))
        if value is not None:
            outcomes[name] = value
    return graded(forecasts, outcomes)


def scored(result: Mapping[str, Any], metric: str | None) -> float | None:
    """A metric of the ledger: of the best state where that is what decides which is best, else of the last."""
    best = result.get("best") or {}
    if metric is not None and best.get("metric") == metric:
        return float(best["value"])
    value = (result.get("metrics") or {}).get(metric)
    return None if value is None else float(value)


def grade_evaluated(evaluation: RunDirectory) -> Iterator[str]:
    """Grade the runs whose last checkpoint a finished evaluation scored as their forecast asks; a line for each.

    Written beside what was graded before, once; the first such evaluation counts.
    """
    result, plan = read_json(evaluation.result_file) or {}, evaluation.plan()
    for model, source in plan.get("sources", {}).items():
        lineage = source.get("lineage") or {}
        if not lineage.get("run") or model not in result.get("metrics", {}):
            continue
        run = RunDirectory(lineage["run"])
        ended = read_json(run.result_file)
        if not ended or lineage.get("step") != ended.get("steps"):
            continue
        said = forecast_of(run)
        if not said or not is_of(said, run):
            continue
        found = graded_by(said, result["metrics"][model], result.get("datasets", {}))
        if found and "accuracy" not in (ended.get("forecast") or {}):
            write_json(run.result_file, ended | {"forecast": (ended.get("forecast") or {}) | found})
            yield f"{run.path.name}: {graded_in_words(found)}"


def graded_by(said: Mapping[str, Any], metrics: Mapping[str, float], datasets: Mapping[str, Any]) -> Graded:
    """The accuracy of a forecast against an evaluation's metrics: the same protocol on the same data, wherever it
    lies. {} where the evaluation does not say."""
    one = said.get("forecasts", {}).get("accuracy", {})
    if not one.get("metric", "").startswith("eval/") or one["metric"].count("/") != 3:
        return {}
    _, protocol, place, kind = one["metric"].split("/")
    split = place.rpartition(".")[2]
    for key, value in metrics.items():
        about = datasets.get(key.split("/")[2], {}) if key.count("/") == 3 else {}
        same = key.split("/")[1::2] == [protocol, kind] and about.get("split") == split
        if same and about.get("fingerprint") == said.get("data_fingerprint"):
            return graded({"accuracy": one}, {"accuracy": value})
    return {}


def graded_in_words(found: Graded) -> str:
    """`forecast: accuracy 0.810 (0.770–0.850), outcome 0.830, inside; time 2 h (1 h–3 h), took 2 h, inside`."""
    parts = []
    for name, one in found.items():
        came = "took" if name == "hours" else "outcome"
        verdict = "inside" if one["inside"] else "outside"
        parts.append(f"{interval_in_words(name, one)}, {came} {_amount(name, one['outcome'])}, {verdict}")
    return f"forecast: {'; '.join(parts)}"


def interval_in_words(name: str, one: Mapping[str, Any]) -> str:
    """`accuracy 0.81 (0.77–0.85)`."""
    said = "time" if name == "hours" else name
    return f"{said} {_amount(name, one['value'])} ({_amount(name, one['low'])}–{_amount(name, one['high'])})"


def _amount(name: str, value: float) -> str:
    if name == "hours":
        return duration_in_words(3600 * value)
    return f"{value:,.2f}" if name == "cost" else f"{value:.3f}"


def forecast_lines(run: RunDirectory) -> Iterator[str]:
    """What was forecast of a run, before it begins: a line, and what each number is based on."""
    said = forecast_of(run)
    if said.get("forecasts"):
        yield forecast_in_words(said["forecasts"], [str(said.get("basis", "what is not said"))])


def forecast_in_words(forecasts: Mapping[str, Mapping[str, Any]], basis: Sequence[str]) -> str:
    """`forecast: accuracy 0.810 (0.770–0.850); time 2 h (1 h–3 h): 80 % intervals by 6 rungs of ladder NAME`."""
    words = "; ".join(interval_in_words(name, one) for name, one in forecasts.items())
    return f"forecast: {words}: 80 % intervals by {'; '.join(basis)}"


def kept_words(runs: Sequence[PastRun]) -> str | None:
    """How often forecasts of these runs held what came: `hours 5 of 7, accuracy 1 of 1`; None where none was graded."""
    kept: dict[str, list[bool]] = {}
    for past in runs:
        for name, one in (past.result.get("forecast") or {}).items():
            kept.setdefault("time" if name == "hours" else name, []).append(one["inside"])
    return ", ".join(f"{name} {sum(inside)} of {len(inside)}" for name, inside in kept.items()) or None
