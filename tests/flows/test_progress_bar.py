"""How far an ingestion is: a bar on a terminal, plain lines elsewhere."""

import io
import re

from rich.console import Console

from flows.command_line.progress_bar import ingest_display
from flows.control import progress


def test_a_terminal_shows_a_bar_with_speed_rejected_and_time_left():
    screen, lines = io.StringIO(), []
    with ingest_display(lines.append, Console(file=screen, force_terminal=True, width=120)) as show:
        for done in (0, 1000, 2000, 3000):
            show(done, 4000, done // 500)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"ingesting .* 75% 3000/4000 [\d,]+ images/s 6 rejected", shown) and lines == []


def test_elsewhere_a_line_now_and_then_counts_what_this_run_made(monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = []
    with ingest_display(lines.append, Console(file=io.StringIO())) as show:
        show(1000, 4000, 1)
        show(1500, 4000, 1)
        show(2000, 4000, 3)
    assert lines == ["2,000 of 4,000 images  100 images/s  3 rejected  20 s left"]
