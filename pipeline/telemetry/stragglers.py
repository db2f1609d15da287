"""Ranks that hold up the others, named with their hosts.

All ranks leave a step together, so the whole step is as long on a fast rank as on a slow one. What tells them apart is
the time until they first meet: each rank's own data and forward. Under ZeRO-3 ranks meet within the forward, so there
a slow processor shows on nobody, only a slow loader does.
"""

import platform
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

FACTOR = 1.3  # slower than the median by this much ...
SHARE = 0.05  # ... and by this share of a step ...
WINDOWS = 3  # ... in so many windows in a row; as many without it, and it keeps up again
LEAST_STEPS = 10  # of a window: a step by itself may be slow for any reason
NAMED = 5  # at a time at most, the slowest first


def window_steps(log_every_steps: int) -> int:
    """Steps that are compared at a time: those between two lines of the log, or as many times that as it takes."""
    return log_every_steps * -(-LEAST_STEPS // log_every_steps)


class Stragglers:
    """Compares the own seconds of several ranks once per window. Collective: every rank must make and call it alike."""

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.hosts: list[str] = [platform.node()] * world_size
        if world_size > 1:
            dist.all_gather_object(self.hosts, platform.node())
        self.streaks = [0] * world_size  # windows in a row in which a rank was slow; below 0 those in which it was not
        self.told: set[int] = set()  # ranks that were said to hold up the others, and still do

    def of_window(self, own_seconds: float, step_seconds: float) -> list[str]:
        """One line per rank that begins or ceases to hold up the others; seconds are means per step of the window."""
        seconds = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        seconds[self.rank] = own_seconds
        dist.all_reduce(seconds)
        return self.named(seconds.tolist(), step_seconds)

    def named(self, seconds: Sequence[float], step_seconds: float) -> list[str]:
        """Count this window, and say who has been slow in it and in those before, and who is no longer; each once."""
        median = statistics.median_low(seconds)
        for rank, own in enumerate(seconds):
            slow = own > FACTOR * median and own - median > SHARE * step_seconds
            streak = self.streaks[rank]
            self.streaks[rank] = max(streak, 0) + 1 if slow else min(streak, 0) - 1
        ended = [rank for rank in sorted(self.told) if self.streaks[rank] <= -WINDOWS]
        self.told -= set(ended)
        untold = {rank for rank, streak in enumerate(self.streaks) if streak >= WINDOWS} - self.told
        begun = sorted(untold, key=lambda rank: -seconds[rank])[: NAMED - len(self.told)]
        self.told |= set(begun)
        others = "the other" if len(seconds) == 2 else "the median rank"
        return [f"rank {rank} on {self.hosts[rank]} no longer holds up the others" for rank in ended] + [
            f"rank {rank} on {self.hosts[rank]} holds up the others: {seconds[rank]:.3g} s of data and forward in each "
            f"step, {others} needs {median:.3g} s"
            for rank in begun
        ]
