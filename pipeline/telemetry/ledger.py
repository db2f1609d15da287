"""The ledger of a run: one JSON line per step, appended in whole lines. The controller forwards it to MLflow."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from pipeline.run_directory import Attempt


class Ledger:
    """Appends to the attempt's metrics.jsonl. Rank 0 only."""

    def __init__(self, attempt: Attempt):
        self._file = os.open(attempt.ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, lines: Iterable[Mapping[str, float]]) -> None:
        """One line each, all in one write; what is not finite is left out: NaN is not JSON."""
        finite = ({key: value for key, value in line.items() if math.isfinite(value)} for line in lines)
        os.write(self._file, b"".join(json.dumps(line).encode() + b"\n" for line in finite))


class SampleRecorder:
    """Writes step, position and key of every sample consumed, tab-separated."""

    def __init__(self, attempt: Attempt, rank: int):
        self._file = open(attempt.samples(rank), "a", buffering=1)

    def write(self, step: int, positions: Tensor, keys: Sequence[str]) -> None:
        pairs = zip(positions.tolist(), keys, strict=True)
        self._file.write("".join(f"{step}\t{position}\t{key}\n" for position, key in pairs))
