"""How far a rank is, in a few bytes that its supervisor reads: also when the rank itself cannot answer any more."""

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

# What a rank can be in. Any other phase (of an evaluation, a registration) has a name, but is not watched.
STEP_PHASES = ("train", "data", "forward", "backward", "update")
LONG_PHASES = ("start", "model", "checkpoint", "roll back", "validation", "finish", "health")
PHASES = (*STEP_PHASES, *LONG_PHASES)
_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_WORDS = struct.Struct("=qqqq")


class Position(NamedTuple):
    """Where a rank is. `count` grows with every phase that it enters: ranks of one run enter the same ones."""

    count: int
    step: int  # the step it makes, from 0; -1 before the first
    phase: str  # "" for one that is not watched
    first_step: int = -1  # that it made; -1 before

    @property
    def in_words(self) -> str:
        phase = self.phase or "a stage"
        return f"in {phase} of step {self.step + 1}" if self.step >= 0 else f"in {phase} before the first step"


class Progress:
    """Written by its rank: a few stores into mapped memory, no system call. Without a `path` nobody else sees it."""

    def __init__(self, path: Path | None = None):
        self._phase = "start"
        self._words = memoryview(_mapped(path) if path else bytearray(_WORDS.size)).cast("q")
        self._words[1], self._words[2], self._words[3] = -1, _NUMBERS["start"], -1

    @property
    def phase(self) -> str:
        return self._phase

    def enter(self, phase: str) -> None:
        self._phase = phase
        self._words[2] = _NUMBERS.get(phase, -1)
        self._words[0] += 1

    @property
    def step(self) -> int:
        return self._words[1]

    @step.setter
    def step(self, step: int) -> None:
        if self._words[3] < 0:
            self._words[3] = step
        self._words[1] = step


def _mapped(path: Path) -> mmap.mmap:
    path.write_bytes(bytes(_WORDS.size))  # written, not only sized: a store into it then needs no more room on disk
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), _WORDS.size)


def progress_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}"


def read_position(path: Path) -> Position | None:
    """Where the rank is that writes `path`; None before it has begun to."""
    try:
        count, step, phase, first_step = _WORDS.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    return Position(count, step, PHASES[phase] if phase >= 0 else "", first_step)
