"""health.jsonl of an attempt: each verdict a line; and how many measurements in a row were bad. Torch-free.

{format_version, step, samples, epoch, progress, metric, value, low, high, basis, verdict, words}. A line that cannot be
read, or is of another format, is passed over: no run and no page depends on it. Keys that are not known are too.
"""

import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import get_args

from pipeline.health.bands import is_number
from pipeline.health.verdicts import Kind, Verdict, is_bad
from pipeline.run_directory import Attempt, RunDirectory

FILE = "health.jsonl"
FORMAT_VERSION = 1  # lines without one are of 1 too
MAY_LACK = {"samples": 0, "epoch": 0.0, "low": None, "high": None, "basis": "", "words": ""}
log = logging.getLogger(__name__)


def write_verdicts(attempt: Attempt, verdicts: Iterable[Verdict]) -> None:
    """Append the verdicts of one moment, all in one write. OSError where there is no room for them."""
    lines = ({"format_version": FORMAT_VERSION} | one.as_line() for one in verdicts)
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    path = attempt.path / FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a full disk has cut the line before
            text = b"\n" + text
        if os.write(file, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def read_verdicts(run: RunDirectory) -> list[list[Verdict]]:
    """Each measurement of a run in the order of its steps.

    Where a later attempt began, or a roll-back led to, what was measured there and behind it counts no longer.
    """
    kept: list[list[Verdict]] = []
    for number in range(1, run.last_attempt() + 1):
        goes_on = False  # with the moment that was begun
        for one in verdicts_of(run.attempt(number).path / FILE):
            newest = kept[-1] if kept and goes_on else []
            if newest and newest[0].step == one.step and one.metric not in [other.metric for other in newest]:
                newest.append(one)
                continue
            while kept and kept[-1][0].step >= one.step:
                kept.pop()
            kept.append([one])
            goes_on = True
    return kept


def verdicts_of(path: Path) -> Iterator[Verdict]:
    """Of the whole lines of a file that may be being written, those that can be read; none where there is no file."""
    text = path.read_bytes() if path.is_file() else b""
    for line in text[: text.rfind(b"\n") + 1].split(b"\n"):
        if (verdict := verdict_of(line)) is not None:
            yield verdict
        elif line:
            _warn_once(path)


def verdict_of(line: bytes) -> Verdict | None:
    """None for a line that is none, or of another format."""
    try:
        said = MAY_LACK | json.loads(line)
        if said.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            return None
        verdict = Verdict(**{field.name: said[field.name] for field in fields(Verdict)})
    except (ValueError, TypeError, KeyError):
        return None
    numbers = (verdict.step, verdict.samples, verdict.epoch, verdict.progress)
    limits = [one for one in (verdict.value, verdict.low, verdict.high) if one is not None]
    words = (verdict.metric, verdict.basis, verdict.words)
    is_sound = all(map(is_number, (*numbers, *limits))) and all(isinstance(one, str) for one in words)
    return verdict if is_sound and isinstance(verdict.step, int) and verdict.verdict in get_args(Kind) else None


@cache  # which makes it once in a process: a controller reads the file again and again
def _warn_once(path: Path) -> None:
    log.warning("%s: damaged, or of another version: lines that cannot be read are passed over", path)


def bad_in_a_row(measurements: Iterable[list[Verdict]]) -> int:
    """How many of the last measurements were bad without a good one among them."""
    count = 0
    for verdicts in measurements:
        count = count + 1 if is_bad(verdicts) else 0
    return count
