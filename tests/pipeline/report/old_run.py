"""A finished training and its evaluation, as an earlier version wrote them, for reports to be made of."""

import itertools
import json
import math
import shutil
from pathlib import Path

from pipeline.run_directory import RunDirectory, write_json
from tests.flows.old_home import GOLDEN, PLACE, RUN, with_paths


def copied_home(folder: Path) -> Path:
    """The kept home, whose paths say where the copy is."""
    home = folder / "home"
    shutil.copytree(GOLDEN / "home_1", home)
    with_paths(home, PLACE, str(home))
    return home


def trained(home: Path) -> RunDirectory:
    return RunDirectory(home / "runs" / RUN)


def measured_health(
    run: RunDirectory, values: dict[str, list[float]], band: tuple[float, float], steps: int = 4
) -> None:
    """health.jsonl with a verdict for each value, and the bands that they were held against."""
    low, high = band
    with open(run.attempt(1).path / "health.jsonl", "w") as file:
        numbers = range(1, 1 + max(map(len, values.values())))
        for number, (metric, told) in itertools.product(numbers, values.items()):
            if number <= len(told):
                value, progress = told[number - 1], number / len(told)
                verdict = "low" if value < low else "high" if value > high else "ok"
                words = f"epoch {number}: {metric.replace('_', ' ')} {value} (expected {low}–{high}) {verdict}"
                file.write(json.dumps({
                    "step": int(progress * steps), "samples": 8 * number, "epoch": number, "progress": progress,
                    "metric": metric, "value": value, "low": low, "high": high, "basis": "the recipe's own run",
                    "verdict": verdict, "words": words,
                }) + "\n")  # fmt: skip
    points = [[0.0, low, high], [1.0, low, high]]
    bands = {"format_version": 1, "basis": "the recipe's own run", "metrics": dict.fromkeys(values, points)}
    write_json(run.path / "bands.json", bands)


def long_ledger(path: Path, steps: int) -> None:
    """As the trainer writes one: a loss that falls, and a validation once in a while."""
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step, "time": 1.79e9 + step, "perf/last_step_seconds": 0.1, "train/loss": 2 / math.sqrt(step),
                "train/learning_rate": 1e-3, "train/gradient_norm": 1.0, "train/skipped": float(step == 7),
            }  # fmt: skip
            if step % (steps // 10) == 0:
                line["validation/loss"] = step / steps
            file.write(json.dumps(line) + "\n")
