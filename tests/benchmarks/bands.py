"""Reference curves of recipes: what health is to be expected, from runs of several seeds on scikit-learn's digits.

`uv run python -m tests.benchmarks.bands [RECIPE ...]` trains each recipe with SEEDS, writes a band file per recipe to
`pipeline/recipes/bands/` and holds runs with the seeds CHECKED against it. A band is the mean over seeds -+ DEVIATIONS
standard deviations, and at least -+ LEAST of the mean: five seeds tell little of their own spread.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.report import machine
from tests.ranks import run_on_ranks

RECIPES = {  # and how many times in a run it is measured
    "pretrain_mae_digits": 12,
    "pretrain_supervised_digits": 12,
    "pretrain_mae_debug": 4,
    "pretrain_simmim_debug": 4,
    "pretrain_patch_colour_debug": 4,
    "pretrain_capi_debug": 4,
    "pretrain_supervised_debug": 4,
}
SEEDS, CHECKED = (0, 1, 2, 3, 4), (5, 6)
DEVIATIONS, LEAST = 4.0, 0.02
PACKAGES = ("torch", "timm", "numpy", "pillow", "scikit-learn")


def main(names: list[str]) -> dict:
    from pipeline.config.ingest import IngestConfig
    from pipeline.ingestion.build import ingest
    from pipeline.preparation.bands import REFERENCES
    from pipeline.run_directory import write_json

    held, cost = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits"
        ingest("sklearn:digits", data, IngestConfig())
        for name in names:
            runs = {seed: trained(Path(folder), data, name, seed) for seed in (*SEEDS, *CHECKED)}
            reference = reference_of(name, [runs[seed] for seed in SEEDS])
            write_json(REFERENCES / f"{name}.json", reference)
            held[name] = [share_inside(runs[seed], reference) for seed in CHECKED]
            cost[name] = round(statistics.median(map(share_of_time, runs.values())), 4)
            sys.stdout.write(f"{name}: inside on other seeds {held[name]}, share of the time {cost[name]:.2%}\n")
    ok = all(min(shares) >= 0.9 for shares in held.values())
    return {"benchmark": "bands", "ok": ok, "inside": held, "share_of_time": cost}


def trained(folder: Path, data: Path, recipe: str, seed: int) -> Any:
    """The run directory of one training."""
    from flows.requests.training import training_run

    settings = [f"seed={seed}", "profile.ranks_per_node=1", "profile.loader_workers=0", "health.every_steps=0"]
    asked = {"data": [str(data)], "profile": "local", "home": folder / "home"}
    first = training_run("pretrain", recipe, overrides=settings, run_dir=str(folder / "plan"), **asked)
    every = max(1, first.plan()["steps"]["steps"] // RECIPES[recipe])
    run = training_run(
        "pretrain", recipe, overrides=[*settings[:-1], f"health.every_steps={every}"],
        run_dir=str(folder / f"{recipe}-{seed}"), **asked,
    )  # fmt: skip
    run_on_ranks(train_whole, 1, str(run.path), timeout_seconds=1800)
    return run


def train_whole(run_path: str) -> None:
    from pipeline.rank import Rank
    from pipeline.run_directory import RunDirectory, write_json
    from pipeline.training.loop import train

    run = RunDirectory(run_path)
    write_json(run.job_file, {"attempt": 1})
    train(Rank(run, run.attempt(1).make(), int(os.environ["RANK"]), 0, 1))


def reference_of(recipe: str, runs: list[Any]) -> dict[str, Any]:
    from pipeline.config.stages import read_run_config
    from pipeline.health.log import read_verdicts

    values: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        for verdict in (one for measurement in read_verdicts(run) for one in measurement):
            values.setdefault(verdict.metric, {}).setdefault(verdict.progress, []).append(verdict.value)
    plan, config = runs[0].plan(), read_run_config(runs[0].path).model_dump(mode="json")
    return {
        "format_version": 1,
        "basis": f"{recipe} on {plan['data']['name']}, {len(runs)} seeds",
        "recipe": recipe,
        "metrics": {
            metric: [[round(progress, 6), *band(of)] for progress, of in sorted(points.items())]
            for metric, points in values.items()
        },
        "seeds": list(SEEDS),
        "band": f"mean over seeds -+ {DEVIATIONS:g} standard deviations, at least -+ {LEAST:.0%} of the mean",
        "measured": machine(PACKAGES),
        "data": {"name": plan["data"]["name"], "fingerprint": plan["data"]["fingerprint"]},
        "config": config | {"data": config["data"] | {"sources": [{} for _ in config["data"]["sources"]]}},
    }


def band(values: list[float]) -> tuple[float, float]:
    mean = statistics.mean(values)
    half = max(DEVIATIONS * statistics.stdev(values), LEAST * abs(mean))
    return float(f"{mean - half:.4g}"), float(f"{mean + half:.4g}")


def share_inside(run: Any, reference: dict[str, Any]) -> float:
    from pipeline.health.bands import bands_of
    from pipeline.health.log import read_verdicts

    bands, inside = bands_of(reference, "measured"), []
    for verdict in (one for measurement in read_verdicts(run) for one in measurement):
        low, high = bands.at(verdict.metric, verdict.progress)
        inside.append(low <= verdict.value <= high)
    return round(sum(inside) / len(inside), 3)


def share_of_time(run: Any) -> float:
    """Of a run's steps and what lies between them, that of measuring its health."""
    lines = [json.loads(line) for line in run.attempt(1).ledger.read_text().splitlines()]
    return sum(line.get("perf/health_seconds", 0.0) for line in lines) / (lines[-1]["time"] - lines[0]["time"])


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(RECIPES)
    print(json.dumps(main(chosen)))
