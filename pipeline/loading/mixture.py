"""Which source each position of a mixture is drawn from, and which of that source's samples: pure, with O(1) seek.

Every lane draws for itself, so that a rank goes on reading only its own part of every source. In a lane the j-th draw
of a source of share w takes place at time (j + u) / w, with u uniform in [0, 1) by (seed, lane, source, j), and the
lane's draws are those of all sources in the order of their times: stratified sampling. So after k draws each source has
come w * k times, give or take one, whatever the weights; and the count before any draw is arithmetic, as nearly all of
those before it are known to have come.

The n-th draw of a source in lane l is position n * C + l of the source's own order of C lanes: each source has its own
epochs. As lanes agree within a draw or so, an epoch's last samples and the next one's first may change places, at most
about one per lane. Torch-free.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.config.training import TrainingConfig
from pipeline.loading.uniform import position_uniform
from pipeline.shards.order import SampleOrder

BLOCK = 1024  # draws that are put in order together


class Places(NamedTuple):
    """Where the samples of some positions lie; int64 arrays of one length. `epochs` counts passes over the source."""

    sources: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    samples: np.ndarray


class Mixture:
    """position -> (source, epoch, shard, sample). A mixture of one source is that source's plain order.

    `sizes` holds the shard sizes of each source, `weights` and `window_shards` one number per source.
    """

    def __init__(
        self, sizes: Sequence[np.ndarray], weights: Sequence[float], *, global_batch_size: int, lanes: int,
        window_shards: Sequence[int], seed: int,
    ):  # fmt: skip
        self.global_batch_size, self.lanes, self.seed = global_batch_size, lanes, seed
        self.shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        batch = global_batch_size if len(sizes) == 1 else lanes
        self.orders = [
            SampleOrder(of_source, batch, lanes, window, seed if number == 0 else _source_seed(seed, number))
            for number, (of_source, window) in enumerate(zip(sizes, window_shards, strict=True))
        ]
        self._block = lru_cache(maxsize=2 * lanes + 8)(self._make_block)

    def locate(self, positions: np.ndarray) -> Places:
        """The places of `positions`, an int64 array in any order."""
        if len(self.orders) == 1:
            return Places(np.zeros(len(positions), np.int64), *self.orders[0].locate_many(positions))
        sources, source_positions = self.draw(positions)
        places = Places(sources, *(np.empty_like(sources) for _ in range(3)))
        for source in np.unique(sources):
            chosen = sources == source
            located = self.orders[source].locate_many(source_positions[chosen])
            for column, values in zip(places[1:], located, strict=True):
                column[chosen] = values
        return places

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, position in the source's own order) of each position."""
        per_lane = self.global_batch_size // self.lanes
        batch, rest = np.divmod(positions, self.global_batch_size)
        lane, place = np.divmod(rest, per_lane)
        block, draw = np.divmod(batch * per_lane + place, BLOCK)
        sources, nth = np.empty_like(positions), np.empty_like(positions)
        for this_lane, this_block in np.unique(np.stack([lane, block]), axis=1).T:
            chosen = (lane == this_lane) & (block == this_block)
            of_block, nth_of_source = self._block(int(this_lane), int(this_block))
            sources[chosen], nth[chosen] = of_block[draw[chosen]], nth_of_source[draw[chosen]]
        return sources, nth * self.lanes + lane

    def positions_of(self, source: int, shard: int, sample: int, end: int) -> np.ndarray:
        """The positions below `end` at which one sample of a source is read, ascending int64."""
        if len(self.orders) == 1:
            return self.orders[0].positions_of(shard, sample, end)
        draws = -(-end // self.global_batch_size) * (self.global_batch_size // self.lanes)  # of a lane, below `end`
        most = self.lanes * (int(draws * self.shares[source]) + len(self.shares) + 1)  # of this source, in all lanes
        of_source = self.orders[source].positions_of(shard, sample, most)
        found = [self._position_of_draw(source, *divmod(int(position), self.lanes)) for position in of_source]
        return np.array(sorted(position for position in found if position < end), dtype=np.int64)

    def _position_of_draw(self, source: int, nth: int, lane: int) -> int:
        """The position of the n-th draw of a source in a lane, which with S sources is within S draws of its time."""
        time = float(nth + _uniform(self.seed, lane, source, np.array([nth]))[0]) / self.shares[source]
        first, last = (max(0, int(time + way * (len(self.shares) + 1))) // BLOCK for way in (-1, 1))
        for block in range(first, last + 1):
            sources, counts = self._block(lane, block)
            if (found := np.flatnonzero((sources == source) & (counts == nth))).size:
                per_lane = self.global_batch_size // self.lanes
                batch, place = divmod(block * BLOCK + int(found[0]), per_lane)
                return batch * self.global_batch_size + lane * per_lane + place
        raise AssertionError(f"draw {nth} of source {source} in lane {lane} is in none of its blocks")

    def _make_block(self, lane: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many of its draws come before) of a lane's draws BLOCK * block ... BLOCK * (block + 1) - 1.

        At time t a source has come within one of w * t times, so the block's draws lie between the times first - S and
        last + S of S sources. Draws well before are counted and not looked at.
        """
        first, margin = block * BLOCK, len(self.shares)
        parts, counted = [], 0
        for source, share in enumerate(self.shares):
            from_draw = max(0, int((first - margin) * share) - 1)
            draws = np.arange(from_draw, int((first + BLOCK + margin) * share) + 2)
            times = (draws + _uniform(self.seed, lane, source, draws)) / share
            parts.append((times, np.full(len(draws), source), draws))
            counted += from_draw
        times, sources, draws = (np.concatenate(column) for column in zip(*parts, strict=True))
        chosen = np.lexsort((sources, times))[first - counted : first - counted + BLOCK]
        return sources[chosen].astype(np.int64), draws[chosen].astype(np.int64)


def planned_mixture(config: TrainingConfig, sizes: Sequence[np.ndarray]) -> Mixture:
    """The mixture of a run. `sizes` holds the shard sizes of each source's selection."""
    data = config.data
    return Mixture(
        sizes,
        [source.weight for source in data.sources] or [1.0],
        global_batch_size=config.global_batch_size,
        lanes=data.lanes,
        window_shards=[source.window_shards or data.window_shards for source in data.sources] or [data.window_shards],
        seed=config.seed,
    )


def _uniform(seed: int, lane: int, source: int, draws: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per draw."""
    return position_uniform(seed, f"mixture {lane} {source}", draws)


def _source_seed(seed: int, number: int) -> str:
    """Sources of equal shape must not be permuted alike."""
    return f"{seed}/{number}"
