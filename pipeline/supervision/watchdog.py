"""Whether the ranks of a node still move, judged from outside, and which one keeps the others waiting.

A rank that hangs makes its peers wait in a collective, so that most ranks that do not move are victims. The one that is
behind all others is the cause. Torch-free; the ranks' own part is `progress`, and faulthandler on DUMP_SIGNAL.
"""

import datetime
import os
import re
import signal
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.progress import LONG_PHASES, Position, progress_file, read_position
from pipeline.run_directory import Attempt

DUMP_SIGNAL = signal.SIGUSR2  # a rank that gets it writes the stacks of all its threads
DUMP_SECONDS = 3.0  # for all ranks to do so
PAUSE_SECONDS = 5.0  # between two looks: the supervisor itself did not run, and nor may its ranks have
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')
_OURS = re.compile(r"/(pipeline|models)/")


def hang_seconds() -> float:
    """How long a rank may take for one phase of a step."""
    return float(os.environ.get("VIT_COLLECTIVE_TIMEOUT_SECONDS", "600"))


def long_hang_seconds() -> float:
    """How long it may take to start, to compile in its first step, to save or to validate."""
    return max(3 * hang_seconds(), 300.0)


def collective_time_out() -> datetime.timedelta:
    """How long a rank waits for its peers before it takes them for lost: longer than its supervisor does."""
    return datetime.timedelta(seconds=long_hang_seconds() + 60)


class Watchdog:
    """Follows ranks through the files they write into `attempt`. `now` is always the caller's monotonic clock."""

    def __init__(self, attempt: Attempt, ranks: Collection[int], now: float, progress: Path | None = None):
        """`progress`: the folder of the ranks' progress files, the attempt's own where none is given."""
        self.attempt, self._looked = attempt, now
        self._files = {rank: progress_file(attempt.heartbeat(0).parent if progress is None else progress, rank)
                       for rank in ranks}  # fmt: skip
        self.positions = dict.fromkeys(ranks, Position(0, -1, "start"))
        self._since = dict.fromkeys(ranks, now)  # it was first seen there

    def look(self, now: float) -> None:
        """Take note of where every rank is."""
        paused = now - self._looked if now - self._looked > PAUSE_SECONDS else 0.0
        self._looked = now
        for rank, before in self.positions.items():
            position = read_position(self._files[rank]) or before
            self._since[rank] = now if position != before else self._since[rank] + paused
            self.positions[rank] = position

    def hung(self, alive: Collection[int], now: float) -> bool:
        """Whether the rank behind all others has been where it is for longer than that may take."""
        last = self._last(alive)
        return now - self._since[last] > self._patience(last)

    def standing(self, alive: Collection[int], now: float) -> tuple[int, float]:
        """The `count` of the rank behind all others, and for how long it has been there."""
        last = self._last(alive)
        return self.positions[last].count, now - self._since[last]

    def _last(self, alive: Collection[int]) -> int:
        return min(alive, key=lambda rank: self.positions[rank].count)

    def places(self, now: float) -> dict[int, dict]:
        """Where each rank is, and for how many seconds, for the heartbeat."""
        return {
            rank: {"phase": at.phase, "step": at.step, "count": at.count, "seconds": round(now - self._since[rank], 1)}
            for rank, at in self.positions.items()
        }

    def _patience(self, rank: int) -> float:
        position = self.positions[rank]
        if not position.phase:
            return float("inf")
        compiles = position.step <= position.first_step
        return long_hang_seconds() if compiles or position.phase in LONG_PHASES else hang_seconds()

    def verdict(self, pids: Mapping[int, int], now: float) -> str:
        """Which of the ranks that are still there hangs, and where; makes all of them dump their stacks."""
        stacks = self.dump_stacks(pids)
        # Where several are equally far behind, those that wait for their peers are not the cause.
        cause = min(pids, key=lambda rank: (self.positions[rank].count, _waits_for_peers(stacks[rank]), rank))
        place = _place(stacks[cause]) or "it did not answer a signal"
        return (
            f"rank {cause} hung {self.positions[cause].in_words} for {now - self._since[cause]:.0f} s: {place}; "
            f"the stacks of all ranks: {self.attempt.stacks(cause).parent}/stacks-rank-*.txt"
        )

    def waits_for_peers(self, pids: Mapping[int, int]) -> bool:
        """Whether all those that are furthest behind wait in a collective; makes all of `pids` dump their stacks."""
        stacks, (count, _) = self.dump_stacks(pids), self.standing(pids, 0.0)
        return all(_waits_for_peers(stacks[rank]) for rank in pids if self.positions[rank].count == count)

    def dump_stacks(self, pids: Mapping[int, int]) -> dict[int, list[str]]:
        """The frames of each rank's main thread, innermost first."""
        for pid in pids.values():
            os.kill(pid, DUMP_SIGNAL)
        deadline, sizes = time.monotonic() + DUMP_SECONDS, None
        files = {rank: self.attempt.stacks(rank) for rank in pids}
        while time.monotonic() < deadline:
            time.sleep(0.2)
            before, sizes = sizes, [path.stat().st_size if path.exists() else 0 for path in files.values()]
            if sizes == before and all(sizes):
                break
        return {rank: main_frames(path) for rank, path in files.items()}


def main_frames(dump: Path) -> list[str]:
    """`FILE:LINE in FUNCTION` of the thread that got the signal, the main one, innermost first."""
    _, _, current = (dump.read_text() if dump.exists() else "").partition("Current thread")
    frames = []
    for line in current.splitlines()[1:]:
        match = _FRAME.fullmatch(line)
        if match is None:
            break
        frames.append(f"{match[1]}:{match[2]} in {match[3]}")
    return frames


def _waits_for_peers(frames: list[str]) -> bool:
    return any("/torch/distributed/" in frame for frame in frames)


def _place(frames: list[str]) -> str:
    """The innermost frame, and the innermost of ours below it."""
    ours = next((frame for frame in frames if _OURS.search(frame)), None)
    return " from ".join(dict.fromkeys(frame for frame in (*frames[:1], ours) if frame))


def killed_for_memory() -> int:
    """How many processes of this container, or of the whole machine where it is none, the kernel has killed so far."""
    for counters in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        words = counters.read_text().split() if counters.exists() else []
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return 0
