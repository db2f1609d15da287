"""An export and its source, each in a process of its own, asked in turn: what they answer, and what that takes."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.errors import RefusedError
from pipeline.exporting import alone

BATCHES = (1, 32)
LEAST_REPEATS, PATIENCE_SECONDS = 3, 120.0  # of one batch size: fewer repeats where they take long


class Opened:
    """A model that another process has opened. RefusedError, with that process's last words, where it dies."""

    def __init__(self, name: str, command: Sequence[str], words: IO[str]):
        self.name, self._words = name, words
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True, env=environment
        )

    def ask(self, **question: Any) -> Any:
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._words.seek(0)
        lines = [line.strip() for line in self._words.read().splitlines() if line.strip()]
        last = lines[-1] if lines and code >= 0 else f"ended by signal {-code}"
        raise RefusedError(f"{self.name} cannot be opened and computed: {last}")

    def close(self) -> None:
        self._process.stdin.close() if not self._process.stdin.closed else None
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def opened(name: str, command: Sequence[str], scratch: Path) -> Iterator[Opened]:
    with open(scratch / f"{name}.log", "w+") as words:
        model = Opened(name, command, words)
        try:
            yield model
        finally:
            with contextlib.suppress(OSError):
                model.close()


def command_of_export(format: str, folder: Path, threads: int) -> list[str]:
    return [sys.executable, str(Path(alone.__file__)), format, str(folder), str(threads)]


def command_of_source(run: Path, threads: int) -> list[str]:
    return [sys.executable, "-m", "pipeline.exporting.original", str(run), str(threads)]


def outputs(model: Opened, images: Path, scratch: Path) -> np.ndarray:
    """(S, V) or (S, D) float32 of all images in a file."""
    to = scratch / f"{model.name}-outputs.npy"
    model.ask(do="outputs", images=str(images), to=str(to))
    return np.load(to)


def figures(models: Sequence[Opened], images: np.ndarray, repeats: int, scratch: Path) -> list[dict[str, Any]]:
    """Of each model the median seconds of a batch of each size, the models in turn, and the peak memory until then."""
    file = scratch / "batch.npy"
    np.save(file, np.resize(images[: BATCHES[-1]], (BATCHES[-1], *images.shape[1:])))
    seconds = {model.name: {} for model in models}
    for batch in BATCHES:
        question, started = {"do": "time", "images": str(file), "batch": batch}, time.monotonic()
        found: dict[str, list[float]] = {model.name: [] for model in models}
        for model in models:
            model.ask(**question)  # the first is slower
        for repeat in range(repeats):
            if repeat >= LEAST_REPEATS and time.monotonic() - started > PATIENCE_SECONDS:
                break
            for model in models:
                found[model.name].append(model.ask(**question))
        for name, values in found.items():
            seconds[name][batch] = (statistics.median(values), len(values))
    return [
        {
            "latency_seconds": {str(batch): median for batch, (median, _) in seconds[model.name].items()},
            "repeats": {str(batch): count for batch, (_, count) in seconds[model.name].items()},
            "peak_memory_bytes": model.ask(do="peak"),
        }
        for model in models
    ]  # fmt: skip
