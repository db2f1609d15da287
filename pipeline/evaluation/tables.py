"""What a person reads of an evaluation: per class, confusions, the worst images, and one table of everything."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.scores import Scored
from pipeline.loading.left_out import all_but_left_out
from pipeline.run_directory import write_atomic
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import ShardReader, node_reader

MOST_DRAWN_CLASSES = 100  # in a picture of confusions


def folder_name(*words: str) -> str:
    """Words as one name of a folder."""
    return "--".join(re.sub(r"[^\w.+=-]+", "-", word).strip("-") or "-" for word in words)


def write_details(folder: Path, scored: Scored, index: DatasetIndex, split: str, worst_images: int) -> None:
    """`per_class.csv`, `confusion.csv` and .png, `worst.csv` and .png of a classification."""
    predictions, classes = scored.predictions, list(index.classes or ())
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "per_class.csv", ("class", "samples", "top1"), _per_class(predictions, classes))
    confusion = confusion_matrix(predictions, len(classes))
    _write_csv(
        folder / "confusion.csv", ("class", "predicted", "samples"),
        ([classes[true], classes[guess], int(confusion[true, guess])] for true, guess in confusion.nonzero().tolist()),
    )  # fmt: skip
    if len(classes) <= MOST_DRAWN_CLASSES:
        _draw_confusion(folder / "confusion.png", confusion, classes)
    if worst_images:
        _write_worst(folder, predictions, index, split, classes, worst_images)


def write_per_class(folder: Path, rows: Sequence[tuple]) -> None:
    """`per_class.csv` of a protocol that decides pixels or boxes; the header comes first."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "per_class.csv", rows[0], rows[1:])


def confusion_matrix(predictions: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """(V, V) int64: samples by their class and the predicted one."""
    cells = predictions["labels"] * num_classes + predictions["predicted"]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def worst_places(predictions: Mapping[str, Tensor], count: int) -> list[int]:
    """Places in the split of the mistakes that the model is surest of, the surest first."""
    doubt = torch.where(predictions["correct"] > 0, -1.0, predictions["confidence"])
    order = doubt.argsort(descending=True, stable=True)[:count]
    return [place for place in order.tolist() if doubt[place] >= 0]


def table_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per model, dataset, protocol and metric of an evaluation's result."""
    rows = []
    for model, metrics in result["metrics"].items():
        for key, value in metrics.items():
            _, protocol, dataset, metric = key.split("/")
            low, high = result["intervals"].get(model, {}).get(key, (None, None))
            rows.append({"model": model, "dataset": dataset, "protocol": protocol, "metric": metric, "value": value,
                         "low": low, "high": high})  # fmt: skip
    return rows


def write_table(path: Path, result: Mapping[str, Any]) -> None:
    rows = table_rows(result)
    _write_csv(path, ("model", "dataset", "protocol", "metric", "value", "low", "high"), (row.values() for row in rows))


def _per_class(predictions: Mapping[str, Tensor], classes: Sequence[str]) -> list[tuple[str, int, str]]:
    labels, correct = predictions["labels"], predictions["correct"].double()
    zeros = torch.zeros(len(classes), dtype=torch.float64)
    right, counts = zeros.index_add(0, labels, correct), torch.bincount(labels, minlength=len(classes))
    return [
        (name, int(count), f"{float(hits) / int(count):.4f}" if count else "")
        for name, hits, count in zip(classes, right, counts, strict=True)
    ]


def _write_worst(
    folder: Path, predictions: Mapping[str, Tensor], index: DatasetIndex, split: str, classes: Sequence[str], count: int
) -> None:
    reader, places = node_reader(index, split), worst_places(predictions, count)
    samples = [_sample_at(reader, place) for place in places]
    rows = [
        (sample.key, sample.shard, classes[int(predictions["labels"][place])],
         classes[int(predictions["predicted"][place])], f"{float(predictions['confidence'][place]):.4f}")
        for place, sample in zip(places, samples, strict=True)
    ]  # fmt: skip
    _write_csv(folder / "worst.csv", ("key", "shard", "class", "predicted", "confidence"), rows)
    if rows:
        _draw_worst(folder / "worst.png", [sample.image for sample in samples], rows)


def _sample_at(reader: ShardReader, place: int):
    selection = all_but_left_out(reader)
    for shard, size in enumerate(selection.shard_sizes.tolist()):
        if place < size:
            return reader.read(shard, selection.sample(shard, place))
        place -= size
    raise IndexError(place)


def _draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    from matplotlib.figure import Figure

    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    side = max(4.0, 0.28 * len(classes) + 1.5)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    if len(classes) <= 20:
        for true, guess in confusion.nonzero().tolist():
            colour = "white" if shares[true, guess] > 0.5 else "black"
            axes.text(guess, true, str(int(confusion[true, guess])), ha="center", va="center", fontsize=6, color=colour)
    figure.savefig(path, dpi=110)


def _draw_worst(path: Path, images: Sequence[bytes], rows: Sequence[tuple]) -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    columns = min(4, len(images))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * lines), layout="constrained")
    for axes, content, row in zip(figure.subplots(lines, columns, squeeze=False).flat, images, rows, strict=False):
        try:
            with Image.open(io.BytesIO(content)) as image:
                axes.imshow(image.convert("RGB"))
        except (OSError, ValueError):  # an array, or of channels that Pillow does not know
            axes.text(0.5, 0.5, row[0], ha="center", va="center", fontsize=6)
        axes.set_title(f"{row[2]}\nsaid {row[3]}, {row[4]}", fontsize=7)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def _write_csv(path: Path, header: Sequence[str], rows) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
