"""`vit quickstart`: the lifecycle flow on scikit-learn's handwritten digits, and a table that says what it shows."""

import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flows.home import tracking_uri
from flows.lifecycle import FROZEN, RANDOM_WEIGHTS, lifecycle_here
from flows.lifecycle_report import lifecycle_folder, publish
from pipeline.evaluation.intervals import interval_of_counts
from pipeline.loading.selection import Selection
from pipeline.report.record import read_record
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.shards.reader import ShardReader

NAME = "digits"
BOOTSTRAP_SAMPLES = 1000
CLOSING = (
    "1,797 digits of 8 x 8 pixels show that every stage works and what labels are worth; at this size plain nearest "
    "neighbours are strong and pretraining cannot show what it is worth on millions of photographs."
)


def quickstart(home: Path, say: Callable[[str], None], started: float) -> dict[str, Any]:
    """Run it, print the table, and return what `quickstart.json` holds. Errors are those of `lifecycle_here`."""
    summary = lifecycle_here(
        home, say, source="sklearn:digits", name=NAME, pretrain_recipe="pretrain_mae_digits",
        finetune_recipe="finetune_digits", scratch_recipe="pretrain_supervised_digits",
    )  # fmt: skip
    baselines = baseline_rows(read_index(summary["data"]))
    report = _with_baselines(home, baselines) or summary["report"]
    rows = _network_rows(summary["metrics"])
    rows += [{key: row[key] for key in ("method", "labels", "accuracy")} for row in baselines]
    picture = home / "quickstart-reconstructions.png"
    shutil.copyfile(Path(summary["pretrained"]) / "reconstructions.png", picture)
    seconds = time.monotonic() - started
    for line in [*_table(summary["stages"], rows, seconds), *_frozen_table(summary["metrics"])]:
        say(line)
    say(CLOSING)
    say(f"masked digits, what the encoder saw, what it filled in: {picture}")
    say(f"report, to open in a browser: {report or 'it was not written'}")
    say(f"registered: {summary['uri']}   load it: mlflow.pyfunc.load_model('{summary['uri']}')")
    say(f"look at both UIs: vit up --dir {home}")
    return {
        "seconds": round(seconds, 1), "uri": summary["uri"], "tracking_uri": tracking_uri(home), "rows": rows,
        "reconstruction": str(picture), "report": report,
    }  # fmt: skip


def _with_baselines(home: Path, baselines: list[dict[str, Any]]) -> str | None:
    """The lifecycle's report again, with what was measured after it; where it is, None where there is none."""
    record = read_record(lifecycle_folder(home, NAME))
    if record is None:
        return None
    record.baselines = baselines
    faults: list[str] = []
    path = publish(record, faults.append)
    return str(path) if path else None


def _network_rows(metrics: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for name, scores in metrics.items():
        method, _, labels = name.partition(", ")
        if (accuracy := scores.get("eval/classify-v1/digits/top1")) is None:
            continue  # an encoder without a head
        rows.append({"method": method, "labels": 0.1 if labels else 1.0, "accuracy": round(accuracy, 4)})
    return rows


def baseline_rows(index: DatasetIndex) -> list[dict[str, Any]]:
    """3-NN and logistic regression on raw pixels, with all labels and with the same tenth the networks get.

    {method, labels, accuracy, low, high}: the 95 % interval over test images, as an evaluation's.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    test, test_labels = _pixels(index, "test", 1.0)
    rows = []
    for fraction in (1.0, 0.1):
        train, labels = _pixels(index, "train", fraction)
        for method, model in (
            ("3-NN", KNeighborsClassifier(3)),
            ("logistic regression", LogisticRegression(max_iter=2000)),
        ):
            right = int((model.fit(train, labels).predict(test) == test_labels).sum())
            counts = np.array([right, len(test) - right])
            low, high = interval_of_counts(counts, lambda drawn: drawn[:, 0] / len(test), samples=BOOTSTRAP_SAMPLES)
            accuracy = round(right / len(test), 4)
            rows.append({"method": method, "labels": fraction, "accuracy": accuracy, "low": low, "high": high})
    return rows


def _pixels(index: DatasetIndex, split: str, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    reader = ShardReader(index, split)
    selection = Selection.of(reader, fraction)
    images, labels = [], []
    for shard, size in enumerate(selection.shard_sizes):
        for place in range(int(size)):
            sample = reader.read(shard, selection.sample(shard, place))
            images.append(np.asarray(Image.open(io.BytesIO(sample.image)).convert("L"), np.float32).ravel() / 255)
            labels.append(sample.label)
    return np.stack(images), np.array(labels)


def _frozen_table(metrics: dict[str, dict[str, float]]) -> list[str]:
    """What the encoder is worth without fine-tuning, beside the same network that learned nothing."""
    columns = {"linear": "linear-cached-v1/digits/top1", "20-NN": "knn-20-v1/digits/top1",
               "5 of each class": "fewshot-lsr-v1/digits/top1_5shot"}  # fmt: skip
    lines = [f"{'frozen encoder':<22} " + " ".join(f"{name:>15}" for name in columns)]
    for model, name in ((FROZEN, "pretrained, no labels"), (RANDOM_WEIGHTS, "random weights")):
        lines.append(f"{name:<22} " + " ".join(f"{metrics[model][f'eval/{key}']:>15.4f}" for key in columns.values()))
    return [*lines, ""]


def _table(stages: list, rows: list[dict[str, Any]], seconds: float) -> list[str]:
    lines = ["", f"{'stage':<12} {'time':>7}  result"]
    lines += [f"{stage:<12} {taken:>5.0f} s  {result}" for stage, taken, result in stages]
    lines += [
        f"{'all':<12} {seconds:>5.0f} s",
        "",
        f"{'method':<22} {'all labels':>10} {'a tenth':>10}   accuracy on test images never trained on",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        by_labels = {row["labels"]: row["accuracy"] for row in rows if row["method"] == method}
        lines.append(f"{method:<22} {by_labels[1.0]:>10.4f} {by_labels[0.1]:>10.4f}")
    return [*lines, ""]
