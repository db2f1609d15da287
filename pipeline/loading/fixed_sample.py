"""The same few images of several splits, whatever the world: what a model in training is looked at with.

They lie evenly over a split, in a few of its shards, so that of a remote dataset a few shards are fetched. One that is
damaged is left out: it decides no run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from models.objectives.batch import NO_LABEL
from pipeline.errors import DataError
from pipeline.loading.evaluation_stream import EvaluationStream
from pipeline.loading.left_out import all_but_left_out
from pipeline.loading.selection import Selection
from pipeline.loading.staging import Stager
from pipeline.loading.stream import Damaged
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import ShardReader
from pipeline.views.evaluation import EvaluationInput

MOST_SHARDS = 16  # of a dataset's split
Choose = Callable[[ShardReader], Selection]


class Part(NamedTuple):
    """A split, and which of its samples may be taken."""

    split: str
    indexes: Sequence[DatasetIndex]
    choose: Choose


class FixedSample:
    """Fills rows as an EvaluationStream does: those of the first part, padded to whole batches, then of the next."""

    def __init__(
        self, parts: Sequence[Part], most: int, rows_per_batch: int, inputs: EvaluationInput,
        classes: Sequence[str] | None,
    ):  # fmt: skip
        """At most `most` images of each part, shared among its datasets by their sizes."""
        self.streams = [
            EvaluationStream(
                part.indexes, part.split, rows_per_batch, inputs, classes, select=partial(_spread, part, most)
            )
            for part in parts
        ]
        self.image_shape = self.streams[0].image_shape
        self.dtype = np.result_type(*(stream.dtype for stream in self.streams))
        self.starts = np.cumsum([0, *(stream.rows for stream in self.streams)])
        self.batches = sum(stream.batches for stream in self.streams)

    def place(self, position: int) -> tuple[int, int]:
        """The number of a row's part, and the row's place there."""
        part = int(np.searchsorted(self.starts, position, side="right")) - 1
        return part, position - int(self.starts[part])

    def fill(self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[list[str], list[Damaged]]:
        """Write the views and labels of `positions` in place; their keys, and what is left out as damaged."""
        keys, damaged = [], []
        for row, position in enumerate(positions.tolist()):
            part, place = self.place(position)
            one = slice(row, row + 1)
            try:
                found, _ = self.streams[part].fill(np.array([place]), images[one], labels[one])
            except DataError as error:
                images[row], labels[row], found = 0, NO_LABEL, [""]
                damaged.append(Damaged(position, error.cause, str(error)))
            keys += found
        return keys, damaged

    def stager(self, positions_of_step: object, steps: range, world_size: int, ranks_per_node: int) -> Stager:
        """Stages nothing ahead: each row is read once."""
        readers = [reader for stream in self.streams for reader in stream.readers]
        return Stager(readers, None, lambda step: (), steps.stop, 0, first_step=steps.start)


def training_selection(fraction: float, most: int | None) -> Choose:
    """The samples that a run trains on; see `Selection.of`."""
    return lambda reader: all_but_left_out(reader, Selection.of(reader, fraction, most))


def _spread(part: Part, most: int, reader: ShardReader) -> Selection:
    """Samples of one dataset, evenly over some of its shards: of several datasets by their share of all samples."""
    every = part.choose(reader)
    sizes = every.shard_sizes.astype(np.int64)
    total = sum(index.num_samples(part.split) for index in part.indexes)
    wanted = min(int(sizes.sum()), max(1, round(most * reader.shard_sizes.sum() / total)))
    shards = _evenly(np.flatnonzero(sizes), MOST_SHARDS)
    while sizes[shards].sum() < wanted:  # small shards: more of them
        shards = _evenly(np.flatnonzero(sizes), 2 * len(shards))
    places = _evenly(np.arange(sizes[shards].sum()), wanted)
    starts = np.cumsum([0, *sizes[shards]])
    chosen = [np.zeros(0, np.int64) for _ in sizes]
    for number, shard in enumerate(shards.tolist()):
        of_shard = places[(places >= starts[number]) & (places < starts[number + 1])] - starts[number]
        chosen[shard] = np.array([every.sample(shard, int(place)) for place in of_shard], np.int64)
    return Selection(np.array([len(samples) for samples in chosen], np.int64), tuple(chosen))


def _evenly(values: np.ndarray, most: int) -> np.ndarray:
    return values[np.arange(min(most, len(values))) * len(values) // min(most, len(values))] if len(values) else values
