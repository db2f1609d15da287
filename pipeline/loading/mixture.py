"""Which source each position of a mixture is drawn from, and which of that source's samples: pure, with O(1) seek.

Every lane draws for itself, so that a rank goes on reading only its own part of every source. A lane's draws come in
blocks of `BLOCK`; in a block each source has an exact quota, its weight rounded to one part in `BLOCK`, and a
permutation by (seed, lane, block) says which draw goes to which source. So the count of a source's draws before any
position is a product and a look-up, and nothing but the position has to be saved.

The n-th draw of a source in lane l is position n * C + l of the source's own order of C lanes: each source has its own
epochs, and no sample of it comes twice before all of them have come once (lanes may be up to a block apart there).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.shards.order import SampleOrder, permutation

BLOCK = 10_000


class Places(NamedTuple):
    """Where the samples of some positions lie; int64 arrays of one length. `epochs` counts passes over the source."""

    sources: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    samples: np.ndarray


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Draws of each source per block: largest remainders of the normalised weights; ValueError for one rounded to 0."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * BLOCK
    counts = np.floor(shares).astype(np.int64)
    left_over = BLOCK - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:left_over]] += 1
    if counts.min() < 1:
        raise ValueError(f"the weights {list(weights)} give a source less than one sample in {BLOCK:,}")
    return counts


class Mixture:
    """position -> (source, epoch, shard, sample). A mixture of one source is that source's plain order.

    `sizes` holds the shard sizes of each source, `window_shards` one number per source.
    """

    def __init__(
        self, sizes: Sequence[np.ndarray], weights: Sequence[float], *, global_batch_size: int, lanes: int,
        window_shards: Sequence[int], seed: int,
    ):  # fmt: skip
        self.global_batch_size, self.lanes, self.seed = global_batch_size, lanes, seed
        self.quotas = quotas(weights)
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
            of_draw, counts = self._block(int(this_lane), int(this_block))
            sources[chosen], nth[chosen] = of_draw[draw[chosen]], counts[draw[chosen]]
        return sources, (block * self.quotas[sources] + nth) * self.lanes + lane

    def _make_block(self, lane: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each draw of a block, and how many draws of that source the block holds before it."""
        ordered = np.repeat(np.arange(len(self.quotas)), self.quotas)
        within = np.concatenate([np.arange(quota) for quota in self.quotas])
        # Draw i takes entry shuffled[i]; within a source the entries are counted in the order of their draws.
        sources = ordered[permutation(BLOCK, self.seed, "source", lane, block)]
        counts = np.empty(BLOCK, np.int64)
        counts[np.argsort(sources, kind="stable")] = within
        return sources, counts


def _source_seed(seed: int, number: int) -> str:
    """Sources of equal shape must not be permuted alike."""
    return f"{seed}/{number}"
