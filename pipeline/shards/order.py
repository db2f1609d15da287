"""Which sample is the i-th of a run: a pure function of (shard sizes, seed, position), for any number of ranks.

Position p counts samples over the whole run. Step s of global batch G reads positions s*G .. (s+1)*G-1; epoch e covers
positions e*N .. (e+1)*N-1. Batches run across epoch borders, so each sample is seen exactly once per epoch.

C lanes keep reading local. In each global batch lane l holds the l-th slice of G/C positions. Per epoch the shards are
permuted, their samples laid out in that order and dealt to the lanes as contiguous ranges; inside its range a lane
permutes samples within windows of W consecutive shards. A rank's slice of the batch is whole lanes (where ranks divide
lanes), so a node of n reads about 1/n of the bytes. Where one window holds every shard, the whole epoch is permuted
before it is dealt: a small set has no locality to keep, and no two of its samples are kept apart by their lanes.

Randomness: each permutation sorts the raw 64-bit output of numpy's Philox, whose key is the first 16 bytes of BLAKE2b
over an ASCII text such as "7:window:3:12:0" (seed, purpose, epoch, lane, window). Bit generators, unlike numpy's
shuffles, give the same stream in every version, so a run continues in its own order after an upgrade.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

MAX_LANES = 64


class _Layout(NamedTuple):
    """One epoch: slot i of the layout holds shard `shards[i]` and begins at place `shard_starts[i]`."""

    shards: np.ndarray
    shard_starts: np.ndarray  # one more than shards
    lane_starts: np.ndarray  # one more than lanes
    first_slots: np.ndarray  # the slot in which each lane begins
    counted_before: np.ndarray  # positions of each lane in the epochs before


class SampleOrder:
    """position -> (epoch, shard, sample in the shard), with O(1) seek.

    `lanes` and `window_shards` belong to the run, like the seed: another value is another order.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        global_batch_size: int,
        lanes: int,
        window_shards: int,
        seed: int | str,
    ):
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.global_batch_size, self.lanes = global_batch_size, lanes
        self.window_shards, self.seed = window_shards, seed
        if self.num_samples < 1 or self.shard_sizes.min() < 0:
            raise ValueError(f"the shards hold {self.num_samples} samples; an order needs at least one")
        if lanes < 1 or global_batch_size < 1 or global_batch_size % lanes:
            raise ValueError(f"lanes {lanes} must divide global_batch_size {global_batch_size}")
        if window_shards < 1:
            raise ValueError(f"window_shards {window_shards} must be at least 1")
        self._layout = lru_cache(maxsize=4)(self._make_layout)
        self._window = lru_cache(maxsize=2 * lanes + 8)(self._make_window)  # of all lanes, and those to come

    def __reduce__(self) -> tuple:
        # Without the cached permutations, which every process makes for itself.
        return SampleOrder, (self.shard_sizes, self.global_batch_size, self.lanes, self.window_shards, self.seed)

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard, sample) of one position."""
        epochs, shards, samples = self.locate_many(np.array([position]))
        return int(epochs[0]), int(shards[0]), int(samples[0])

    def locate_many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs, shards, samples) of many positions, in any order; int64 arrays of the same length."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs = positions // self.num_samples
        shards, samples = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], samples[chosen] = self._locate_in_epoch(int(epoch), positions[chosen])
        return epochs, shards, samples

    def positions_of(self, shard: int, sample: int, end: int) -> np.ndarray:
        """The positions below `end` at which one sample is read, ascending int64: the inverse of `locate`.

        One in each epoch: a count over the one window that holds the sample, so it costs less than a permutation.
        """
        epochs = range(-(-end // self.num_samples))
        found = np.array([self._position_in_epoch(epoch, shard, sample) for epoch in epochs], dtype=np.int64)
        return found[found < end]

    def _position_in_epoch(self, epoch: int, shard: int, sample: int) -> int:
        layout, per_lane = self._layout(epoch), self.global_batch_size // self.lanes
        slot = int(np.flatnonzero(layout.shards == shard)[0])
        place = self._unshuffle(epoch, layout, slot, int(layout.shard_starts[slot]) + sample)
        lane = int(_slot_of(layout.lane_starts, place))
        batch, rest = divmod(int(place - layout.lane_starts[lane] + layout.counted_before[lane]), per_lane)
        return batch * self.global_batch_size + lane * per_lane + rest

    def _unshuffle(self, epoch: int, layout: _Layout, slot: int, shuffled: int) -> int:
        """The place that `_shuffle` takes to `shuffled`, a place of the shard at `slot`."""
        if self.window_shards >= len(self.shard_sizes):
            return place_in_permutation(shuffled, self.num_samples, self.seed, "window", epoch, -1, 0)
        lane = int(_slot_of(layout.lane_starts, shuffled))  # a window lies in one lane
        window = (slot - int(layout.first_slots[lane])) // self.window_shards
        start, end = self._window_bounds(layout, lane, window)
        return start + place_in_permutation(shuffled - start, end - start, self.seed, "window", epoch, lane, window)

    def _locate_in_epoch(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        layout = self._layout(epoch)
        per_lane = self.global_batch_size // self.lanes
        lane = positions % self.global_batch_size // per_lane
        nth_of_lane = self._count_in_lane(lane, positions) - layout.counted_before[lane]
        place = self._shuffle(epoch, layout, lane, layout.lane_starts[lane] + nth_of_lane)
        slot = _slot_of(layout.shard_starts, place)
        return layout.shards[slot], place - layout.shard_starts[slot]

    def _count_in_lane(self, lane: np.ndarray, before: np.ndarray | int) -> np.ndarray:
        """How many positions below `before` fall to each lane: a count, not a search, as lanes repeat with period G."""
        per_lane = self.global_batch_size // self.lanes
        batches, rest = np.divmod(before, self.global_batch_size)
        return batches * per_lane + np.clip(rest - lane * per_lane, 0, per_lane)

    def _make_layout(self, epoch: int) -> _Layout:
        lane = np.arange(self.lanes)
        shards = permutation(len(self.shard_sizes), self.seed, "shards", epoch)
        shard_starts = _starts(self.shard_sizes[shards])
        before = self._count_in_lane(lane, epoch * self.num_samples)
        lane_starts = _starts(self._count_in_lane(lane, (epoch + 1) * self.num_samples) - before)
        return _Layout(shards, shard_starts, lane_starts, _slot_of(shard_starts, lane_starts[:-1]), before)

    def _shuffle(self, epoch: int, layout: _Layout, lane: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Where each place of the epoch's layout goes when its window is permuted."""
        if self.window_shards >= len(self.shard_sizes):
            return self._window(epoch, -1, 0, self.num_samples)[place]
        window = (_slot_of(layout.shard_starts, place) - layout.first_slots[lane]) // self.window_shards
        groups, group = np.unique(lane * len(self.shard_sizes) + window, return_inverse=True)
        shuffled = np.empty_like(place)
        for number, (this_lane, this_window) in enumerate(zip(*np.divmod(groups, len(self.shard_sizes)), strict=True)):
            chosen = group == number
            start, end = self._window_bounds(layout, int(this_lane), int(this_window))
            permutation = self._window(epoch, int(this_lane), int(this_window), end - start)
            shuffled[chosen] = start + permutation[place[chosen] - start]
        return shuffled

    def _window_bounds(self, layout: _Layout, lane: int, window: int) -> tuple[int, int]:
        first, last = layout.first_slots[lane] + self.window_shards * np.array([window, window + 1])
        start, end = layout.shard_starts[[first, min(last, len(self.shard_sizes))]]
        return max(int(start), int(layout.lane_starts[lane])), min(int(end), int(layout.lane_starts[lane + 1]))

    def _make_window(self, epoch: int, lane: int, window: int, size: int) -> np.ndarray:
        return permutation(size, self.seed, "window", epoch, lane, window)


def permutation(size: int, seed: int | str, purpose: str, *where: int) -> np.ndarray:
    """(size,) int64: 0 .. size - 1 in the order that (seed, purpose, where) fixes."""
    return np.argsort(_words(size, seed, purpose, *where), kind="stable")


def place_in_permutation(value: int, size: int, seed: int | str, purpose: str, *where: int) -> int:
    """Where `value` stands in `permutation(size, ...)`: how many words sort before its own, which needs no sorting."""
    words = _words(size, seed, purpose, *where)
    return int((words < words[value]).sum() + (words[:value] == words[value]).sum())


def _words(size: int, seed: int | str, purpose: str, *where: int) -> np.ndarray:
    key = digest(16, seed, purpose, *where)
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)


def digest(size: int, *parts: int | str) -> bytes:
    """`size` bytes of BLAKE2b over the parts as text, joined by colons: the root of all that is drawn here."""
    return hashlib.blake2b(":".join(map(str, parts)).encode("ascii"), digest_size=size).digest()


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def _slot_of(starts: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.searchsorted(starts, place, "right") - 1


def sample_seed(seed: int, position: int, purpose: str) -> int:
    """64 bits for the randomness of one sample: its crop, its mask, its mixing partner (`purpose`, ASCII).

    The first 8 bytes, little-endian, of BLAKE2b over "seed:position:purpose": the same on every machine and rank.
    """
    return int.from_bytes(digest(8, seed, position, purpose), "little")


def positions_of_rank(
    global_batch_size: int, step: int, rank: int, world_size: int, skipped: Sequence[tuple[int, int]] = ()
) -> np.ndarray:
    """The positions that `rank` reads in `step`: its contiguous slice of the global batch."""
    per_rank, remainder = divmod(global_batch_size, world_size)
    if remainder:
        raise ValueError(f"{world_size} ranks do not divide global_batch_size {global_batch_size}")
    start = step * global_batch_size + rank * per_rank
    return pass_over(np.arange(start, start + per_rank, dtype=np.int64), skipped)


def pass_over(counts: np.ndarray, skipped: Sequence[tuple[int, int]]) -> np.ndarray:
    """The position of the n-th sample that is read, for each n of `counts`, when ranges [from, to) are passed over."""
    positions = np.array(counts, dtype=np.int64)
    for start, end in merged_ranges(skipped):
        positions[positions >= start] += end - start
    return positions


def count_before(position: int, skipped: Sequence[tuple[int, int]]) -> int | None:
    """Which sample that is read a position holds, counted from 0: the inverse of `pass_over`; None if passed over."""
    passed = 0
    for start, end in merged_ranges(skipped):
        if start <= position < end:
            return None
        passed += end - start if end <= position else 0
    return position - passed


def merged_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same positions as ascending ranges that neither overlap nor touch."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((int(start), int(end)) for start, end in ranges):
        if not 0 <= start < end:
            raise ValueError(f"[{start}, {end}) is not a range of positions")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def default_lanes(global_batch_size: int) -> int:
    """The largest divisor of the global batch up to 64: up to 64 nodes read only their own part of the data."""
    return max(lanes for lanes in range(1, MAX_LANES + 1) if global_batch_size % lanes == 0)


def bytes_at_a_time(shard_bytes: Sequence[int], lanes: int, window_shards: int) -> int:
    """At most so many bytes of shards are in the windows that `lanes` lanes read together."""
    largest = sorted(shard_bytes, reverse=True)
    return sum(largest[: lanes * (window_shards + 1)])  # a lane's range begins and ends within shards


def default_window_shards(shard_bytes: Sequence[int] | np.ndarray, window_bytes: int) -> int:
    """How many consecutive shards make a window of about `window_bytes`; all of them where the set is that small."""
    total, shards = sum(map(int, shard_bytes)), len(shard_bytes)
    return shards if total <= window_bytes else max(1, window_bytes * shards // total)
