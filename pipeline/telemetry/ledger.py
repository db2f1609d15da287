"""The ledger of a run: one JSON line per step, appended with one write. The controller forwards it to MLflow."""

import json
import math
import os
import time
from typing import Any

from pipeline.run_directory import Attempt


class Ledger:
    """Appends to the attempt's metrics.jsonl. Rank 0 only."""

    def __init__(self, attempt: Attempt):
        self._file = os.open(attempt.ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, step: int, **values: Any) -> None:
        finite = {key: value for key, value in values.items() if math.isfinite(value)}  # NaN is not JSON
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | finite)
        os.write(self._file, line.encode() + b"\n")


class SampleRecorder:
    """Writes step, position and key of every sample consumed, tab-separated, when asked to (`data.record`)."""

    def __init__(self, attempt: Attempt, rank: int, enabled: bool):
        self._file = open(attempt.samples(rank), "a", buffering=1) if enabled else None

    def write(self, step: int, positions: list[int], keys: list[str]) -> None:
        if self._file is not None:
            self._file.write("".join(f"{step}\t{p}\t{k}\n" for p, k in zip(positions, keys, strict=True)))
