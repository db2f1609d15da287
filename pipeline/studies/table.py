"""A study's files and its table for people: `study.json`, `study.csv`, `study.svg`."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.run_directory import write_atomic, write_json
from pipeline.studies.findings import findings
from pipeline.studies.plot import draw
from pipeline.studies.points import Point, points_of
from pipeline.words import duration_in_words, in_columns, number_in_words

FORMAT_VERSION = 1


def write_study(
    folder: Path, asked: Mapping[str, Any], facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """Write the three files, the plot where there is something to show; what study.json holds.

    `asked` is the study's config, `facts` what is the same for all rows, `rows` one for each cell and seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    points = points_of(rows)
    study = {"format_version": FORMAT_VERSION, "asked": asked, **facts, "rows": list(rows),
             "points": [point._asdict() for point in points], "findings": findings(points)}  # fmt: skip
    write_json(folder / "study.json", study)
    text = io.StringIO()
    flat = [row | {"low": (row["interval"] or (None,))[0], "high": (row["interval"] or (None,))[-1]} for row in rows]
    writer = csv.DictWriter(text, [key for key in flat[0] if key != "interval"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat)
    write_atomic(folder / "study.csv", text.getvalue())
    if points:
        write_atomic(folder / "study.svg", draw(points, facts["title"], facts["scored"]))
    return study


def table_lines(points: Sequence[Point]) -> Iterator[str]:
    """A line for each point, in columns."""
    header = ["network", "objective", "images", "petaFLOP", "top-1", "95 % interval", "seeds"]
    cells = [
        [point.network, point.objective, f"{point.images:,}", number_of(point.petaflop), f"{point.accuracy:.4f}",
         f"[{point.low:.4f}, {point.high:.4f}]", str(point.seeds)]
        for point in points
    ]  # fmt: skip
    yield from in_columns([header, *cells])


def planned_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each run before anything runs: what it sees, and about how long it takes."""
    header = ["network", "objective", "images", "seed", "parameters", "images seen", "petaFLOP", "about", "run"]
    cells = [
        [row["network"], row["objective"], f"{row['images']:,}", str(row["seed"]),
         f"{number_in_words(row['parameters'] / 1e6)} M", f"{row['images_seen']:,}", number_of(row["petaflop"]),
         duration_in_words(row["planned_seconds"]), Path(row["run"]).name]
        for row in rows if row["run"]
    ]  # fmt: skip
    yield from in_columns([header, *cells])


def number_of(petaflop: float) -> str:
    """Three digits that count, also of little."""
    return f"{petaflop:,.0f}" if petaflop >= 99.95 else f"{petaflop:.3g}"
