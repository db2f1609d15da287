"""Reading a run's ledgers once, through any number of restarts of the run and of the reader."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.run_directory import RunDirectory, read_json, write_json

RATE = "train/learning_rate"


class LedgerCursor:
    """How far one reader has come; kept in a file of the run directory."""

    def __init__(self, run: RunDirectory, name: str):
        self.run, self.file = run, run.path / name

    def fresh(self) -> Iterator[list[dict[str, Any]]]:
        """The lines that this reader has not had, by attempt.

        A step that a later attempt repeats, as it was killed behind its checkpoint, is not fresh. One that is made anew
        is: by the attempt that went back over it, or at another rate by a run that was made longer. Of a step that one
        reading finds twice the later line counts. The cursor moves when the next lines are asked for: what a reader
        failed at comes again.
        """
        cursor = {"offsets": {}, "highest": {}, "last_step": -1} | (read_json(self.file) or {})
        for number in range(1, self.run.last_attempt() + 1):
            name = f"{number:02d}"
            ledger = self.run.attempt(number).ledger
            offset = cursor["offsets"].get(name, 0)
            if not ledger.is_file() or ledger.stat().st_size <= offset:
                continue
            lines, offset = _whole_lines(ledger, offset)
            fresh, highest = self._fresh_of(lines, number, cursor["last_step"], cursor["highest"].get(name, -1))
            yield fresh
            cursor["offsets"][name], cursor["highest"][name] = offset, highest
            cursor["last_step"] = max(cursor["last_step"], highest)
            write_json(self.file, cursor)

    def is_behind(self) -> bool:
        """Whether the ledgers hold whole lines that this reader has not had."""
        offsets = (read_json(self.file) or {}).get("offsets", {})
        for number in range(1, self.run.last_attempt() + 1):
            ledger, offset = self.run.attempt(number).ledger, offsets.get(f"{number:02d}", 0)
            if ledger.is_file() and ledger.stat().st_size > offset and _whole_lines(ledger, offset)[0]:
                return True
        return False

    def _fresh_of(
        self, lines: list[dict[str, Any]], number: int, last_step: int, highest: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Those of attempt `number` that are fresh, and its highest step, which was `highest` before them."""
        fresh: dict[int, dict[str, Any]] = {}
        rates: dict[int, float] | None = None
        for line in lines:
            step = line["step"]
            is_new = step > last_step or step <= highest
            if not is_new:
                rates = self._rates_before(number) if rates is None else rates
                is_new = line.get(RATE) != rates.get(step, line.get(RATE))
            if is_new:
                fresh.pop(step, None)
                fresh[step] = line
            highest = max(highest, step)
        return list(fresh.values()), highest

    def _rates_before(self, number: int) -> dict[int, float]:
        """The rate of each step that the attempts before this one made."""
        ledgers = [self.run.attempt(one).ledger for one in range(1, number)]
        lines = [line for ledger in ledgers if ledger.is_file() for line in _whole_lines(ledger, 0)[0]]
        return {line["step"]: line[RATE] for line in lines if RATE in line}


def metrics_of(line: dict[str, Any]) -> dict[str, float]:
    """What a line of the ledger says beside its step and time."""
    return {key: value for key, value in line.items() if "/" in key}


def _whole_lines(ledger: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Parsed lines from a byte offset on, and the offset after the last whole one."""
    with open(ledger, "rb") as file:
        file.seek(offset)
        content = file.read()
    end = content.rfind(b"\n") + 1
    return [json.loads(line) for line in content[:end].splitlines()], offset + end
