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
WINDOWS = 3  # ... in so many windows in a row
NAMED = 5  # at most, the slowest first


class Stragglers:
    """Compares the ranks' own seconds once per window. Collective: every rank must make and call it alike."""

    def __init__(self, rank: int, world_size: int, device: torch.device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.hosts: list[str] = [platform.node()] * world_size
        if world_size > 1:
            dist.all_gather_object(self.hosts, platform.node())
        self.slow_windows = [0] * world_size

    def of_window(self, own_seconds: float, step_seconds: float) -> list[str]:
        """One line per rank that has been slow for WINDOWS windows; seconds are means per step of the window."""
        if self.world_size == 1:
            return []
        seconds = torch.zeros(self.world_size, dtype=torch.float64, device=self.device)
        seconds[self.rank] = own_seconds
        dist.all_reduce(seconds)
        return self.named(seconds.tolist(), step_seconds)

    def named(self, seconds: Sequence[float], step_seconds: float) -> list[str]:
        """Count this window, and name who was slow in it and in those before."""
        median = statistics.median_low(seconds)
        for rank, own in enumerate(seconds):
            slow = own > FACTOR * median and own - median > SHARE * step_seconds
            self.slow_windows[rank] = self.slow_windows[rank] + 1 if slow else 0
        slow = [rank for rank, windows in enumerate(self.slow_windows) if windows >= WINDOWS]
        return [
            f"rank {rank} on {self.hosts[rank]} holds up the others: {seconds[rank]:.3g} s of data and forward in each "
            f"step, the median rank needs {median:.3g} s"
            for rank in sorted(slow, key=lambda rank: -seconds[rank])[:NAMED]
        ]
