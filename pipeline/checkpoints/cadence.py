"""How often to save: every so many steps, or as often as pays for the failures that are to be expected.

A checkpoint costs what training waits for it; a failure costs half an interval on average. With a cost of C seconds
and M seconds between failures the sum is least at T = sqrt(2 C M) (Young, 1974), and Daly (2006, equation 20) adds
the terms that matter where T is not small beside M.
"""

import math

FIRST_SECONDS = 120.0  # the first checkpoint comes early: it proves the disk, and measures what a save costs
LONGEST_SECONDS = 1800.0
WRITING_SHARE = 0.1  # of the time, at most, is spent on writing: disk and network have other users


def best_interval_seconds(cost: float, between_failures: float) -> float:
    """Seconds of training between checkpoints that lose the least; all in seconds (Daly, 2006, equation 20)."""
    if cost >= 2 * between_failures:
        return between_failures
    share = cost / (2 * between_failures)
    return math.sqrt(2 * cost * between_failures) * (1 + math.sqrt(share) / 3 + share / 9) - cost


class Cadence:
    """Whether it is time to save, by the clock of the one rank that asks."""

    def __init__(self, hours_between_failures: float, nodes: int, now: float):
        self.between_failures = 3600 * hours_between_failures / nodes
        self.interval_seconds = FIRST_SECONDS
        self._last = now

    def is_time(self, now: float) -> bool:
        return now - self._last >= self.interval_seconds

    def saved(self, now: float) -> None:
        self._last = now

    def measured(self, stall_seconds: float, seconds: float) -> None:
        """What a save cost: training waited `stall_seconds`, and it was committed `seconds` after it began."""
        best = best_interval_seconds(stall_seconds, self.between_failures)
        self.interval_seconds = min(max(best, seconds / WRITING_SHARE), LONGEST_SECONDS)
