"""health.jsonl of an attempt: each verdict a line; and how many measurements in a row were bad. Torch-free."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.health.verdicts import Verdict, is_bad
from pipeline.run_directory import Attempt, RunDirectory

FILE = "health.jsonl"


def write_verdicts(attempt: Attempt, verdicts: Iterable[Verdict]) -> None:
    """Append the verdicts of one moment, all in one write."""
    text = "".join(json.dumps(one.as_line(), allow_nan=False) + "\n" for one in verdicts)
    file = os.open(attempt.path / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def read_verdicts(run: RunDirectory) -> list[list[Verdict]]:
    """Each measurement of a run in the order of its steps; of a step measured twice the later attempt's counts."""
    found: dict[int, list[Verdict]] = {}
    for number in range(1, run.last_attempt() + 1):
        of_attempt = list(verdicts_of(run.attempt(number).path / FILE))
        for step in dict.fromkeys(one.step for one in of_attempt):
            latest = {one.metric: one for one in of_attempt if one.step == step}  # a roll-back measures it again
            found[step] = list(latest.values())
    return [found[step] for step in sorted(found)]


def verdicts_of(path: Path) -> Iterator[Verdict]:
    """The whole lines of a file that may be being written; none where there is no file."""
    text = path.read_text() if path.is_file() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        yield Verdict(**json.loads(line))


def bad_in_a_row(measurements: Iterable[list[Verdict]]) -> int:
    """How many of the last measurements were bad without a good one among them."""
    count = 0
    for verdicts in measurements:
        count = count + 1 if is_bad(verdicts) else 0
    return count
