"""The progress of an ingestion in a terminal: a bar with images/s, rejected images and the time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as Row
from rich.text import Text

from flows.control.progress import Say, ingest_progress
from pipeline.ingestion.progress import INGESTING
from pipeline.ingestion.progress import Progress as Told


class _SpeedColumn(ProgressColumn):
    def render(self, task: Row) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} images/s")


@contextmanager
def ingest_display(say: Say, console: Console | None = None) -> Iterator[Told]:
    """The callback that `ingest` tells its progress: a bar on a terminal, elsewhere a line now and then by `say`."""
    console = console or Console(force_terminal=sys.stdout.isatty())  # not what FORCE_COLOR says: that is of colours
    if not console.is_terminal:
        yield ingest_progress(say)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), _SpeedColumn(),
        TextColumn("{task.fields[rejected]:,} rejected"), TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, speed_estimate_period=60) as bar:
        row = bar.add_task("listing the source", total=None, rejected=0)

        def show(done: int, total: int, rejected: int, what: str = INGESTING) -> None:
            bar.update(row, description=what, completed=done, total=total, rejected=rejected)

        yield show
