"""The samples of a split in the order of its shards, over and over, without augmentation: what a model is scored on.

Samples on the tombstone list are left out and not counted.
Position p is row p mod `rows` of a pass; rows beyond the last sample pad the pass to whole batches on every rank.
"""

from collections.abc import Callable, Sequence

import numpy as np

from models.objectives.batch import NO_LABEL
from pipeline.errors import DataError, InputError
from pipeline.loading.left_out import all_but_left_out
from pipeline.loading.selection import Selection
from pipeline.loading.sources import label_map
from pipeline.loading.staging import Stager
from pipeline.loading.stream import Damaged, dtype_of
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import ShardReader, node_readers
from pipeline.views.evaluation import EvaluationInput

Alteration = Callable[[np.ndarray, int], None]  # of a view in place, from its position: (H, W, C) uint8


class EvaluationStream:
    """Fills rows of a batch as SampleStream does; rows of padding are black and have no label."""

    def __init__(
        self, indexes: Sequence[DatasetIndex], split: str, rows_per_batch: int, inputs: EvaluationInput,
        classes: Sequence[str] | None, alter: Alteration | None = None,
        select: Callable[[ShardReader], Selection] = all_but_left_out,
    ):  # fmt: skip
        """`rows_per_batch` counts those of all ranks; labels are numbers among `classes`. `alter` spoils the views.
        `select` says which samples have a row."""
        self.inputs, self.alter = inputs, alter
        self.readers, _ = node_readers(indexes, split)
        self.dtype = np.result_type(*(dtype_of(reader, inputs.channels) for reader in self.readers))
        self.label_maps = [label_map(index, classes) for index in indexes]
        self.selections = [select(reader) for reader in self.readers]
        sizes = [(source, int(size)) for source, s in enumerate(self.selections) for size in s.shard_sizes]
        self.sources = np.array([source for source, _ in sizes])
        self.first_shards = np.cumsum([0, *(len(reader.shard_sizes) for reader in self.readers)])
        self.starts = np.cumsum([0, *(size for _, size in sizes)])
        self.num_samples = int(self.starts[-1])
        if not self.num_samples:
            raise InputError(
                f"{indexes[0].directory}: every sample of split `{split}` is on its tombstone list; none is left"
            )
        self.batches = -(-self.num_samples // rows_per_batch)  # of one pass
        self.rows = self.batches * rows_per_batch

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a row."""
        return *self.inputs.size, self.inputs.channels

    def fill(self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[list[str], list[Damaged]]:
        """Write the views and labels of `positions` in place; their keys. DataError for a damaged sample.

        Shape:
            positions: (B,) int64
            images: (B, H, W, C) of `dtype`
            labels: (B,) int64
        """
        keys = []
        for row, position in enumerate((positions % self.rows).tolist()):
            if position >= self.num_samples:
                images[row], labels[row] = 0, NO_LABEL
                keys.append("")
                continue
            place = int(np.searchsorted(self.starts, position, side="right")) - 1
            source = int(self.sources[place])
            shard = place - int(self.first_shards[source])
            labels[row], key = self._view(source, shard, position - int(self.starts[place]), images[row])
            if self.alter is not None:
                self.alter(images[row], position)
            keys.append(key)
        return keys, []

    def _view(self, source: int, shard: int, number: int, image: np.ndarray) -> tuple[int, str]:
        sample = self.readers[source].read(shard, self.selections[source].sample(shard, number))
        try:
            self.inputs.write(sample.image, sample.extension, image)
        except ImageFault as fault:
            detail = f"{sample.shard}: sample `{sample.key}`: cannot be evaluated ({fault.detail})"
            raise DataError(detail, cause="undecodable", shard=sample.shard, key=sample.key) from None
        return int(self.label_maps[source][sample.label]), sample.key

    def stager(self, positions_of_step: object, steps: range, world_size: int, ranks_per_node: int) -> Stager:
        """Stages nothing ahead: a pass reads each shard once, in order."""
        return Stager(self.readers, None, lambda step: (), steps.stop, 0, first_step=steps.start)
