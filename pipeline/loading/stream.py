"""The sample stream of a run: positions in, augmented images out, a pure function of (datasets, config, position).

Ranks and workers only decide who does the work. Every sample that is read is checked against the index; one that is
damaged stops the run, unless `data.max_damaged` allows for it. Then the next sample of its shard stands in for it, the
same one on any rank, and it is counted by cause: there are never silently fewer samples. The same stands in for a
sample that is on the dataset's tombstone list, which is not read at all.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import numpy as np

from pipeline.config.training import TrainingConfig
from pipeline.errors import Cause, DataError
from pipeline.loading.left_out import LeftOut, following
from pipeline.loading.mixture import planned_mixture
from pipeline.loading.selection import Selection
from pipeline.loading.sources import label_map, union_of_classes
from pipeline.loading.staging import Stager
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import Sample, ShardReader, cache_shortage, node_readers
from pipeline.views.augmentation import training_view
from pipeline.views.pixels import view_dtype
from pipeline.views.sample_generator import sample_generator

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1  # Fibonacci hashing: multiples spread evenly over a word
CHECKED_SHARE = 16  # without `data.verify: full`, one sample in this many has its checksum computed
CAUSES: tuple[Cause, ...] = get_args(Cause)
_PROBED = 8  # samples that may be damaged before one says how deep the pixels are
log = logging.getLogger(__name__)


class Damaged(NamedTuple):
    """A sample that could not be used, and for which another stood in."""

    position: int
    cause: Cause
    detail: str


class SampleStream:
    """Fills rows of a batch with the samples at given positions."""

    def __init__(self, config: TrainingConfig, indexes: Sequence[DatasetIndex]):
        data = config.data
        self.config = config
        self.readers, self.cache = node_readers(indexes, data.split)
        self.dtype = np.result_type(*(dtype_of(reader, config.encoder.channels) for reader in self.readers))
        self.selections = [Selection.of(reader, data.label_fraction, data.max_samples) for reader in self.readers]
        self.left_out = [
            LeftOut(selection, reader.left_out(), index.directory)
            for selection, reader, index in zip(self.selections, self.readers, indexes, strict=True)
        ]
        classes = union_of_classes(indexes)
        self.label_maps = [label_map(index, classes) for index in indexes]
        self.mixture = planned_mixture(config, [selection.shard_sizes for selection in self.selections])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of a row."""
        return *self.config.encoder.input_size, self.config.encoder.channels

    def fill(self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray) -> tuple[list[str], list[Damaged]]:
        """Write the views and labels of `positions` in place; their keys, and what was damaged.

        Raises DataError for a damaged sample when `data.max_damaged` is 0.

        Shape:
            positions: (B,) int64
            images: (B, H, W, C) of `dtype`
            labels: (B,) int64
        """
        keys, damaged = [], []
        for row, (position, (source, shard, place)) in enumerate(
            zip(positions.tolist(), self._located(positions), strict=True)
        ):
            try:
                sample = self._view(position, source, shard, place, images[row])
            except DataError as error:
                if self.config.data.max_damaged == 0:
                    raise
                damaged.append(Damaged(position, error.cause, str(error)))
                sample = self._stand_in(position, source, shard, place, images[row], error)
            labels[row] = self.label_maps[source][sample.label]
            keys.append(sample.key)
        return keys, damaged

    def keys(self, positions: np.ndarray) -> list[str]:
        """Keys of the samples at `positions`, from the shards' tables alone."""
        located = self._located(positions)
        tables = {(source, shard): self.readers[source].keys(shard) for source, shard in {one[:2] for one in located}}
        return [tables[source, shard][self.selections[source].sample(shard, place)] for source, shard, place in located]

    def _located(self, positions: np.ndarray) -> list[tuple[int, int, int]]:
        """(source, shard, place) of what is read at each of `positions`."""
        places = self.mixture.locate(positions)
        located = zip(places.sources.tolist(), places.shards.tolist(), places.samples.tolist(), strict=True)
        return [(source, *self.left_out[source].present(shard, place)) for source, shard, place in located]

    def num_left_out(self, positions: np.ndarray) -> int:
        """At how many of `positions` another sample stands in for one that is left out."""
        places = self.mixture.locate(positions)
        located = zip(places.sources.tolist(), places.shards.tolist(), places.samples.tolist(), strict=True)
        return sum((shard, place) in self.left_out[source].places for source, shard, place in located)

    def stager(
        self, positions_of_step: Callable[[int], np.ndarray], steps: range, world_size: int, ranks_per_node: int
    ) -> Stager:
        """Brings remote shards of `steps` to this node ahead of use; each rank fills its part of half the cache."""
        self._leave_a_small_cache(-(-self.mixture.lanes * ranks_per_node // world_size))

        def shards_of_step(step: int) -> list[tuple[int, int]]:
            places = self.mixture.locate(positions_of_step(step))
            return list(dict.fromkeys(zip(places.sources.tolist(), places.shards.tolist(), strict=True)))

        ahead_bytes = self.cache.limit_bytes // 2 // ranks_per_node if self.cache else 0
        return Stager(self.readers, self.cache, shards_of_step, steps.stop, ahead_bytes, first_step=steps.start)

    def _leave_a_small_cache(self, lanes: int) -> None:
        """Read where the shards lie, if the cache cannot hold the windows of a node's lanes."""
        windows = [order.window_shards for order in self.mixture.orders]
        if (shortage := cache_shortage(self.readers, windows, lanes, self.cache)) is not None:
            log.warning("%s", shortage)
            self.cache, self.readers = None, [reader.without_cache() for reader in self.readers]

    def _stand_in(
        self, position: int, source: int, shard: int, place: int, image: np.ndarray, error: DataError
    ) -> Sample:
        """The next sample of the shard that can be used, else of the shards that follow."""
        gone = shard if error.cause == "missing" else -1
        for this, nth in following(self.left_out[source].sizes, shard, place):
            if this == gone or (this, nth) in self.left_out[source].places:
                continue
            try:
                return self._view(position, source, this, nth, image)
            except DataError as another:
                gone = this if another.cause == "missing" else gone
        raise DataError(f"position {position}: no sample of its dataset can be used: {error}", cause=error.cause)

    def _view(self, position: int, source: int, shard: int, place: int, image: np.ndarray) -> Sample:
        """Read, check and decode one sample into `image`."""
        reader, number = self.readers[source], self.selections[source].sample(shard, place)
        sample = reader.read(shard, number, verify=self._verifies(position))
        generator = sample_generator(self.config.seed, position, "augment")
        try:
            training_view(
                sample.image, sample.extension, image, self.config.augmentation, generator, fill=self.config.data.mean
            )
        except ImageFault as fault:
            reader.read(shard, number, verify=True)  # that its bytes have changed would be the better explanation
            what = "does not fit" if fault.reason == "unsupported_mode" else "cannot be decoded"
            raise DataError(
                f"{sample.shard}: sample `{sample.key}`: {what} ({fault.detail}); ingest the dataset again without "
                "such images, or allow for some with --set data.max_damaged=N",
                cause="undecodable", shard=sample.shard, key=sample.key,
            ) from None  # fmt: skip
        return sample

    def _verifies(self, position: int) -> bool:
        chosen = position * _GOLDEN & _WORD < _WORD // CHECKED_SHARE
        return chosen or self.config.data.verify == "full"


def dtype_of(reader: ShardReader, channels: int) -> np.dtype:
    """What a batch of this dataset holds, from the first of its samples that can be read; not through the cache."""
    reader = reader.without_cache() if reader.any_goes_through_cache() else reader
    for number in range(min(_PROBED, int(reader.shard_sizes[0]))):
        try:
            sample = reader.read(0, number)
            return view_dtype(sample.image, sample.extension, channels)
        except (DataError, ImageFault):
            continue  # it will be met, and told of, in its place
    return np.dtype(np.uint8)
