"""The ledger of a run: one JSON line per step, appended with one write. The controller forwards it to MLflow."""

import json
import math
import os
import resource
import time
from collections import deque
from typing import Any

import torch

from pipeline.run_directory import Attempt


class Ledger:
    """Appends to the attempt's metrics.jsonl. Rank 0 only."""

    def __init__(self, attempt: Attempt):
        self._file = os.open(attempt.ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, step: int, **values: Any) -> None:
        finite = {key: value for key, value in values.items() if math.isfinite(value)}  # NaN is not JSON
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | finite)
        os.write(self._file, line.encode() + b"\n")


class SpeedMeter:
    """Images per second, share of time spent waiting for data, and seconds left, over the last steps."""

    def __init__(self, images_per_step: int, last_step: int, window: int = 20):
        self.images_per_step, self.last_step = images_per_step, last_step
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)  # (seconds of the step, seconds of waiting)

    def add(self, step_seconds: float, wait_seconds: float) -> None:
        self.recent.append((step_seconds, wait_seconds))

    def figures(self, step: int) -> dict[str, float]:
        total = sum(seconds for seconds, _ in self.recent) or 1e-9
        speed = self.images_per_step * len(self.recent) / total
        return {
            "perf/images_per_second": round(speed, 2),
            "perf/step_seconds": round(total / len(self.recent), 4),
            "perf/last_step_seconds": round(self.recent[-1][0], 4),
            "perf/peak_memory_bytes": peak_memory_bytes(),
            "perf/data_wait_share": round(sum(wait for _, wait in self.recent) / total, 4),
            "perf/seconds_left": round((self.last_step - step) * total / len(self.recent), 1),
        }


def peak_memory_bytes() -> int:
    """The most memory this rank has held: of its accelerator, or resident in the process where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SampleRecorder:
    """Writes step, position and key of every sample consumed, tab-separated, when asked to (`data.record`)."""

    def __init__(self, attempt: Attempt, rank: int, enabled: bool):
        self._file = open(attempt.samples(rank), "a", buffering=1) if enabled else None

    def write(self, step: int, positions: list[int], keys: list[str]) -> None:
        if self._file is not None:
            self._file.write("".join(f"{step}\t{p}\t{k}\n" for p, k in zip(positions, keys, strict=True)))
