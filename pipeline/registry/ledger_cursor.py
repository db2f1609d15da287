"""Reading a run's ledgers once, through any number of restarts of the run and of the reader."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.run_directory import RunDirectory, read_json, write_json


class LedgerCursor:
    """How far one reader has come; kept in a file of the run directory."""

    def __init__(self, run: RunDirectory, name: str):
        self.run, self.file = run, run.path / name

    def fresh(self) -> Iterator[list[dict[str, Any]]]:
        """The lines that this reader has not had, by attempt; a step that an attempt repeats is not fresh.

        The cursor moves when the next lines are asked for: what a reader failed at comes again.
        """
        cursor = read_json(self.file) or {"offsets": {}, "last_step": -1}
        for number in range(1, self.run.last_attempt() + 1):
            name = f"{number:02d}"
            ledger = self.run.attempt(number).ledger
            offset = cursor["offsets"].get(name, 0)
            if not ledger.is_file() or ledger.stat().st_size <= offset:
                continue
            lines, offset = _whole_lines(ledger, offset)
            fresh = [line for line in lines if line["step"] > cursor["last_step"]]
            yield fresh
            cursor["offsets"][name] = offset
            cursor["last_step"] = max([cursor["last_step"], *(line["step"] for line in fresh)])
            write_json(self.file, cursor)

    def is_behind(self) -> bool:
        """Whether the ledgers hold whole lines that this reader has not had."""
        offsets = (read_json(self.file) or {}).get("offsets", {})
        for number in range(1, self.run.last_attempt() + 1):
            ledger, offset = self.run.attempt(number).ledger, offsets.get(f"{number:02d}", 0)
            if ledger.is_file() and ledger.stat().st_size > offset and _whole_lines(ledger, offset)[0]:
                return True
        return False


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
