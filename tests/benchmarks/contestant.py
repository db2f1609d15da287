"""One contestant of a benchmark: a process that stays, and makes as many images as it is told to, on one thread.

A contestant is a module with `REQUIREMENTS` (what its environment needs beside torch, torchvision and Pillow; empty:
the project's own environment will do) and `batches(workspace, batch_size, image_size, num_images)`, which yields the
size of one batch after the other without end, in passes of `num_images` images.

The process is `python -m tests.benchmarks.contestant MODULE WORKSPACE BATCH_SIZE IMAGE_SIZE NUM_IMAGES`: it answers
each number of images on standard input with one line of JSON, and ends with its input.
"""

import importlib
import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 600  # for the making of its data and for one round
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "DO_NOT_TRACK": "1"}


class Round(NamedTuple):
    """What one round cost, per image, seconds."""

    cpu_seconds: float
    wall_seconds: float
    bare_cpu_seconds: float | None = None  # of what it is held against in its own process, where there is such a thing


class ContestantError(Exception):
    """A contestant that cannot run, with the reason in one line."""


class Contestant:
    """A running contestant; `warm` has made and dropped its first images."""

    def __init__(
        self, python: Path, module: str, workspace: Path, *sizes: int, program: str = "tests.benchmarks.contestant"
    ):
        self.log = workspace / f"{module.rpartition('.')[2]}.log"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", program, module, str(workspace), *map(str, sizes)],
                cwd=ROOT,
                env=os.environ | ONE_THREAD | OFFLINE,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def run(self, num_images: int) -> Round:
        """Make at least `num_images` more images; ContestantError when it cannot."""
        try:
            self._process.stdin.write(f"{num_images}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the empty answer says so
        if not select.select([self._process.stdout], [], [], PATIENCE_SECONDS)[0]:
            self._process.kill()
            raise ContestantError(f"no answer in {PATIENCE_SECONDS} s; see {self.log}")
        answer = json.loads(self._process.stdout.readline() or "{}")
        if "images" not in answer:
            raise ContestantError(answer.get("error") or _last_line(self.log))
        return Round(*(value and value / answer["images"] for value in (answer.get(field) for field in Round._fields)))

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"ended without a word; see {log}"


def serve(module: str, workspace: Path, batch_size: int, image_size: int, num_images: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    try:
        import torch

        torch.set_num_threads(1)
        batches = importlib.import_module(module).batches(workspace, batch_size, image_size, num_images)
        for line in sys.stdin:
            _answer(answers, **_timed(batches, int(line)))
    except Exception as error:  # whatever a peer raises, the table names it
        _answer(answers, error=" ".join(f"{type(error).__name__}: {error}".split())[:200])
        raise


def _timed(batches, wanted: int) -> dict[str, float]:
    cpu, wall, images = _cpu_seconds(), time.perf_counter(), 0
    while images < wanted:
        images += next(batches)
    return {
        "images": images,
        "cpu_seconds": _cpu_seconds() - cpu,
        "wall_seconds": time.perf_counter() - wall,
    }


def _cpu_seconds() -> float:
    """Of this process, and of the programs that it has run."""
    programs = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + programs.ru_utime + programs.ru_stime


def _answer(stream, **content: object) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
