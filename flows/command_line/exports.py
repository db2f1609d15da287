"""What the command line says of an export: one table, beside its source."""

from collections.abc import Callable
from typing import Any

from flows.command_line.runs import controlled, finished
from flows.home import home_directory
from flows.requests.exporting import export_run
from pipeline.errors import EXIT_DONE
from pipeline.run_directory import read_json
from pipeline.words import bytes_in_words

Say = Callable[..., None]


def export_command(
    model: str, dest: str, format: str, data: str | None, overrides: list[str], directory: str | None, say: Say
) -> int:
    home = home_directory(directory)
    run = export_run(model, dest, format=format, data=data, overrides=overrides, home=home)
    if run.job_file.is_file():
        say(f"following {run.path.name}, which makes this export already")
    conclusion = controlled(run, home, say)
    if report := read_json(run.path / "parity.json"):
        for line in [*export_lines(report), *(f"note: {note}" for note in report["notes"])]:
            say(line)
    if conclusion.code == EXIT_DONE:
        say(f"{conclusion.result['destination']}: {', '.join(conclusion.result['files'])}; open it by "
            f"{conclusion.result['open'].replace('DEST', conclusion.result['destination'])}")  # fmt: skip
    return finished(conclusion, say)


def export_lines(report: dict[str, Any]) -> list[str]:
    """The table of an export, and what it was measured on."""
    accuracy = "mAP" if report["sample"]["accuracy"] == "mean average precision" else "accuracy"
    rows = [("format", "size", "batch of 1", "batch of 32", "peak memory", "max |difference|", "agreement", accuracy)]
    for row in report["table"]:
        one, many = (f"{1000 * row['latency_seconds'][batch]:.1f} ms" for batch in ("1", "32"))
        rows.append((
            row["format"], bytes_in_words(row["bytes"]), one, many, bytes_in_words(row["peak_memory_bytes"]),
            _shown(row.get("max_difference"), "{:.2g}"), _shown(row.get("agreement"), "{:.2%}"),
            _shown(row.get("accuracy"), "{:.4f}"),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    on = report["measured_on"]
    return [*lines, f"on {report['sample']['words']}; {on['threads']} threads of {on['processor']}"]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
