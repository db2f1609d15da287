"""What stands in for samples that are on a dataset's tombstone list: the next sample of the shard, the same anywhere.

The order of all others stays as it was, so a run that has begun goes on where it stood.
"""

from collections.abc import Iterator

import numpy as np

from pipeline.errors import InputError
from pipeline.loading.selection import Selection
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import ShardReader

_NUM_LEFT_OUT: dict[tuple, int] = {}  # by directory, split, shards, and fingerprint of what remains


class LeftOut:
    """The left-out places of a selection. `places` holds (shard, place) of each."""

    def __init__(self, selection: Selection, samples: frozenset[tuple[int, int]], where: object = "the dataset"):
        """`samples` are (shard, sample). InputError, naming `where`, if nothing else is left."""
        self.sizes = selection.shard_sizes.tolist()
        places = ((shard, selection.place(shard, sample)) for shard, sample in sorted(samples))
        self.places = {(shard, place) for shard, place in places if place is not None}
        if self.places and len(self.places) == sum(self.sizes):
            raise InputError(f"{where}: every sample of the split is on its tombstone list; nothing is left to read")

    def present(self, shard: int, place: int) -> tuple[int, int]:
        """The place itself, or the one that stands in for it."""
        if (shard, place) not in self.places:
            return shard, place
        return next(other for other in following(self.sizes, shard, place) if other not in self.places)


def following(sizes: list[int], shard: int, place: int) -> Iterator[tuple[int, int]]:
    """The other places of the shard, from the next one on, then those of the shards that follow."""
    for further in range(len(sizes)):
        this = (shard + further) % len(sizes)
        for step in range(1 if further == 0 else 0, sizes[this]):
            yield this, (place + step) % sizes[this]


def num_scored(index: DatasetIndex, split: str) -> int:
    """How many samples of a split are scored. What is left out is looked up once in a process."""
    if not index.tombstones:
        return index.num_samples(split)
    shards = tuple((shard.name, shard.sha256) for shard in index.shards(split))
    read = str(index.directory), split, shards, index.remaining_fingerprint
    if read not in _NUM_LEFT_OUT:
        _NUM_LEFT_OUT[read] = len(ShardReader(index, split).left_out())
    return index.num_samples(split) - _NUM_LEFT_OUT[read]


def all_but_left_out(reader: ShardReader, selection: Selection | None = None) -> Selection:
    """What is scored of a split, or of a selection of it: every sample but those on the tombstone list, and nothing in
    their place."""
    selection = selection or Selection(reader.shard_sizes)
    if not (samples := reader.left_out()):
        return selection
    gone: dict[int, list[int]] = {}
    for shard, sample in samples:
        gone.setdefault(shard, []).append(sample)
    every = selection.chosen or tuple(np.arange(size) for size in selection.shard_sizes.tolist())
    chosen = tuple(np.setdiff1d(of_shard, gone.get(shard, [])).astype(np.int64) for shard, of_shard in enumerate(every))
    return Selection(np.array([len(samples) for samples in chosen], np.int64), chosen)
