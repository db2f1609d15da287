"""What a benchmark says: a table for people, one line of JSON for machines, and a section of RESULTS.md."""

import argparse
import inspect
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "RESULTS.md"


class Figure(NamedTuple):
    """Median, least and greatest of one thing measured several times."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:,.{digits}f} ({self.least:,.{digits}f}-{self.greatest:,.{digits}f})"


class Goal(NamedTuple):
    """A figure and the bound that it is held against."""

    value: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self, name: str) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'ok    ' if self.met else 'MISSED'} {name}: {self.value:.3f}, goal {sign} {self.bound:g}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain aligned text, the first column to the left."""
    widths = [max(len(row[number]) for row in [columns, *rows]) for number in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) if number == 0 else cell.rjust(width)
                  for number, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in [columns, ["-" * width for width in widths], *rows]
    ]  # fmt: skip
    return "\n".join([title, "", *lines, "", ""])


def verdict(name: str, goals: dict[str, Goal], **content: Any) -> dict[str, Any]:
    """The JSON object of a benchmark; `ok` is that every goal is met."""
    return {
        "benchmark": name,
        **content,
        "ok": all(goal.met for goal in goals.values()),
        "goals": {
            key: {"value": round(goal.value, 4), "goal": goal.bound, "ok": goal.met} for key, goal in goals.items()
        },
    }


def machine(packages: Sequence[str]) -> str:
    """Date, processor, load and versions, in one paragraph."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    load = f"load {os.getloadavg()[0]:.1f} at the end"
    return f"{date.today()}; {processor}, {load}; Python {platform.python_version()}, {versions}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main(benchmark: Callable[..., tuple[str, dict[str, Any]]], name: str, packages: Sequence[str]) -> None:
    """Run `benchmark(**sizes)`, whose integer arguments are options, and say what it found; exit 0 when it ran."""
    parser = argparse.ArgumentParser(
        prog=f"python -m tests.benchmarks.{name}", description=sys.modules["__main__"].__doc__
    )
    for argument, parameter in inspect.signature(benchmark).parameters.items():
        parser.add_argument(f"--{argument.replace('_', '-')}", type=int, default=parameter.default)
    parser.add_argument("--record", action="store_true", help=f"put the figures into {RESULTS.name}")
    options = vars(parser.parse_args())
    record = options.pop("record")
    text, result = benchmark(**options)
    text = f"{machine(packages)}\n\n{text}"
    print(text)
    if record:
        write_section(RESULTS, name, f"`{_command(name)}`\n\n```\n{text.strip()}\n```\n\n`{json.dumps(result)}`")
    print(json.dumps(result), flush=True)


def _command(name: str) -> str:
    return shlex.join(["uv", "run", "python", "-m", f"tests.benchmarks.{name}", *sys.argv[1:]])


def write_section(path: Path, name: str, content: str) -> None:
    """Replace the section `## name` of a Markdown file, or add it."""
    head, *sections = path.read_text().split("\n## ")
    kept = [section for section in sections if section.splitlines()[0] != name]
    path.write_text(
        "\n## ".join([head.rstrip() + "\n", *sorted([*(s.strip() + "\n" for s in kept), f"{name}\n\n{content}\n"])])
    )
