"""What a report says of an evaluation: every model beside the others, with intervals, and where it goes wrong."""

import csv
import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.pages.parts import Html, folded, joined, paragraph, table
from pipeline.report.charts import Score, score_chart
from pipeline.report.pictures import Album
from pipeline.report.training_sections import NOT_MEASURED
from pipeline.run_directory import RunDirectory, read_json

DECIDING = ("top1", "top1_5shot", "map", "mean_iou", "ece")  # of each protocol the first that it has
SHARES = ("top1", "top1_5shot", "map", "mean_iou")  # from 0 to 1, the more the better
MOST_ROWS = 12  # of confusions and of classes
MOST_METRICS = 2000
MOST_TABLE_BYTES = 64 << 20


def scores(evaluation: Path, baselines: Sequence[Mapping[str, Any]], album: Album) -> Html:
    """The evaluation of a run directory; a chart of the first protocol, tables of all."""
    result = read_json(RunDirectory(evaluation).result_file)
    if result is None:
        return paragraph(f"{NOT_MEASURED}: the evaluation was not finished", "quiet")
    columns = deciding_columns(result["metrics"])
    shares = [column for column in columns if column.rpartition("/")[2] in SHARES]
    first = next(iter(result["metrics"]), None)
    return joined(
        _about(result),
        _chart(result, shares[0], baselines) if shares else "",
        _table(result, columns, baselines),
        _differences(result),
        _mistakes(evaluation, result, first, album) if first else "",
        folded("Every metric with its interval", _all(result)),
    )


def deciding_columns(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Of each protocol on each split the metric that it is known by, in order; robustness and the like have others."""
    found: dict[str, dict[str, None]] = {}
    for scored in metrics.values():
        for key in scored:
            column, _, metric = key.rpartition("/")
            found.setdefault(column, {})[metric] = None
    return [
        f"{column}/{next((name for name in DECIDING if name in told), next(iter(told)))}"
        for column, told in found.items()
    ]


def headline(evaluation: Path) -> tuple[str, float, tuple[float, float] | None] | None:
    """Metric, value and interval of the first model's first share; None without one."""
    result = read_json(RunDirectory(evaluation).result_file) or {"metrics": {}}
    for model, scored in result["metrics"].items():
        for key, value in scored.items():
            if key.rpartition("/")[2] in SHARES:
                interval = result["intervals"].get(model, {}).get(key)
                return key, value, tuple(interval) if interval else None
    return None


def _about(result: Mapping[str, Any]) -> Html:
    told = []
    for name, one in (result.get("datasets") or {}).items():
        left_out = f", {one['left_out']:,} left out" if one.get("left_out") else ""
        told.append(f"{name}: {one['count']:,} images of split {one['split']}{left_out}")
    words = "; ".join(told) or "the splits are not recorded"
    return paragraph(f"On {words}. Shares are of 100; in brackets 95 % intervals over images.")


def _chart(result: Mapping[str, Any], key: str, baselines: Sequence[Mapping[str, Any]]) -> Html:
    _, protocol, dataset, metric = key.split("/")
    rows = []
    for number, (model, scored) in enumerate(result["metrics"].items()):
        if key in scored:
            low, high = result["intervals"].get(model, {}).get(key) or (None, None)
            rows.append(Score(model, scored[key], low, high, "one" if number == 0 else "two"))
    for one in baselines:
        named = f"{one['method']}, {_labels(one)}"
        rows.append(Score(named, one["accuracy"], one.get("low"), one.get("high"), "base"))
    return score_chart(f"{metric} by {protocol} on {dataset}", rows)


def _labels(one: Mapping[str, Any]) -> str:
    return "all labels" if one["labels"] == 1 else f"{100 * one['labels']:g} % of the labels"


def _table(result: Mapping[str, Any], columns: Sequence[str], baselines: Sequence[Mapping[str, Any]]) -> Html:
    head = ["model", *(f"{column.split('/')[1]}, {column.rpartition('/')[2]}" for column in columns)]
    several = len({column.split("/")[2] for column in columns}) > 1
    if several:
        head = ["model", *(" ".join(column.split("/")[1:]) for column in columns)]
    rows = [
        (model, *(_cell(scored.get(key), result["intervals"].get(model, {}).get(key), key) for key in columns))
        for model, scored in result["metrics"].items()
    ]
    for one in baselines:
        between = (one["low"], one["high"]) if "low" in one else None
        row = [_cell(one["accuracy"], between, columns[0] if columns else "x/top1"), *[""] * (len(columns) - 1)]
        rows.append((f"{one['method']}, {_labels(one)}", *row))
    return table(head, rows, numbers=range(1, len(head)))


def _cell(value: float | None, interval: Sequence[float] | None, key: str) -> str:
    if value is None:
        return NOT_MEASURED
    if key.rpartition("/")[2] not in SHARES:
        return f"{value:.4f}"
    return f"{100 * value:.2f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _differences(result: Mapping[str, Any]) -> Html:
    rows = []
    for model, compared in (result.get("differences") or {}).items():
        for column, one in compared.items():
            rows.append((
                model, column.partition("/")[2], f"{100 * one['difference']:+.2f}",
                f"[{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]", f"{one['here']:,} : {one['there']:,}",
                f"{one['p']:.2g}",
            ))  # fmt: skip
    if not rows:
        return Html()
    against = next(one["against"] for compared in result["differences"].values() for one in compared.values())
    words = (
        f"Paired, image by image, against {against}: the difference in points, its 95 % interval, images that one "
        "alone has right (this : that), and p of an exact McNemar test."
    )
    head = ("model", "protocol and data", "difference", "interval", "right alone", "p")
    return joined(Html("<h3>Differences</h3>"), paragraph(words), table(head, rows, numbers=(2, 3, 4, 5)))


def _mistakes(evaluation: Path, result: Mapping[str, Any], model: str, album: Album) -> Html:
    """Of the first model: its worst classes, what it takes for what, and the images it is most wrong about."""
    files = (result.get("predictions") or {}).get(model) or {}
    if not files:
        return Html()
    column, file = next(iter(files.items()))
    folder = (evaluation / file).parent
    confused = heapq.nlargest(MOST_ROWS, _confusions(folder / "confusion.csv"), key=lambda one: one[2])
    worst = heapq.nsmallest(MOST_ROWS, _classes(folder / "per_class.csv"), key=lambda one: one[1])
    parts = [Html("<h3>Where it goes wrong</h3>"), paragraph(f"{model}, {column.partition('/')[2]}.", "quiet")]
    if confused:
        rows = [(true, guess, f"{count:,}") for true, guess, count in confused]
        parts.append(table(("class", "taken for", "images"), rows, numbers=(2,)))
    if worst:
        rows = [(name, f"{100 * share:.1f}", f"{samples:,}") for name, share, samples in worst]
        known = table(("class", "top-1, of 100", "images"), rows, numbers=(1, 2))
        parts.append(folded("The classes it knows least", known))
    parts.append(Html('<div class="pictures">'))
    parts.append(album.figure(folder / "confusion.png", "Confusions", "Rows are classes, columns what was said."))
    parts.append(
        album.figure(folder / "worst.png", "The mistakes it was surest of", "Class, what was said, how surely.")
    )
    return joined(*parts, Html("</div>"))


def _confusions(path: Path) -> Iterator[tuple[str, str, int]]:
    """What is not on the diagonal; of a table too long to read, nothing."""
    for row in _rows(path):
        if row["class"] != row["predicted"]:
            yield row["class"], row["predicted"], int(row["samples"])


def _classes(path: Path) -> Iterator[tuple[str, float, int]]:
    for row in _rows(path):
        if row.get("top1"):
            yield row["class"], float(row["top1"]), int(row["samples"])


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if path.is_file() and path.stat().st_size <= MOST_TABLE_BYTES:
        with open(path, newline="") as file:
            yield from csv.DictReader(file)


def _all(result: Mapping[str, Any]) -> Html:
    rows = []
    for model, scored in result["metrics"].items():
        for key, value in scored.items():
            interval = result["intervals"].get(model, {}).get(key)
            between = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            rows.append((model, key.removeprefix("eval/"), f"{value:.4f}", between))
    more = len(rows) - MOST_METRICS
    told = table(("model", "metric", "value", "interval"), rows[:MOST_METRICS], numbers=(2, 3))
    return joined(told, paragraph(f"and {more:,} more, in table.csv", "quiet") if more > 0 else "")
