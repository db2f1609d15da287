"""What is known of every image that is compared, as arrays: 130 bytes an image.

First the images of the dataset, in its order (train, validation, test; shard by shard), also those that an earlier run
left out as copies; then the evaluation splits of the datasets that `leakage_against` names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.ingestion.duplicates.hash_file import HashFile
from pipeline.ingestion.duplicates.sample_hashes import hashed_shards
from pipeline.shards.index import SPLITS, DatasetIndex

OTHERS = len(SPLITS)  # places from here on are datasets of `leakage_against`
NUMBERLESS = -2  # label of an image of another dataset, whose numbers mean other classes


@dataclass(frozen=True)
class ComparedSamples:
    """(N,) arrays, read-only. `place` is the split's number, or OTHERS + the number of another dataset; `shard` and
    `number` say which file of which job of the plan, or which sample of which shard of `other_shards`; `row` is the
    sample in the shard as it lies there, -1 where it was left out."""

    pixels: np.ndarray  # (N, 4) uint64
    perceptual: np.ndarray
    thumbnail: np.ndarray  # (N, 64) uint8
    side: np.ndarray
    label: np.ndarray
    place: np.ndarray
    shard: np.ndarray
    number: np.ndarray
    row: np.ndarray
    other_shards: tuple[tuple[int, str, int], ...] = ()  # (dataset, split, shard of the split)

    def __len__(self) -> int:
        return len(self.place)


class SamplesBuilder:
    """Fills the arrays, shard by shard; `count` is how many images there will be at most."""

    def __init__(self, count: int):
        self._used = 0
        self._columns = {
            "pixels": np.empty((count, 4), np.uint64), "perceptual": np.empty(count, np.uint64),
            "thumbnail": np.empty((count, 64), np.uint8), "side": np.empty(count, np.uint32),
            "label": np.empty(count, np.int32), "place": np.empty(count, np.uint8),
            "shard": np.empty(count, np.uint32), "number": np.empty(count, np.uint32),
            "row": np.empty(count, np.int32),
        }  # fmt: skip
        self._other_shards: list[tuple[int, str, int]] = []

    def add_job(self, place: int, job: int, hashes: HashFile) -> None:
        rows = hashes.rows
        row = np.where(rows["kept"], np.cumsum(rows["kept"]) - 1, -1)
        self._add(rows["hashes"], label=rows["label"], place=place, shard=job, number=rows["number"], row=row)

    def add_other(self, dataset: int, split: str, shard: int, hashes: np.ndarray) -> None:
        number = len(self._other_shards)
        self._other_shards.append((dataset, split, shard))
        row = np.arange(len(hashes))
        self._add(hashes, label=NUMBERLESS, place=OTHERS + dataset, shard=number, number=row, row=row)

    def finished(self) -> ComparedSamples:
        columns = {name: column[: self._used] for name, column in self._columns.items()}
        return ComparedSamples(**columns, other_shards=tuple(self._other_shards))

    def _add(self, hashes: np.ndarray, **columns: object) -> None:
        span = slice(self._used, self._used + len(hashes))
        for name in ("pixels", "perceptual", "thumbnail", "side"):
            self._columns[name][span] = hashes[name]
        for name, values in columns.items():
            self._columns[name][span] = values
        self._used = span.stop


def evaluation_splits(index: DatasetIndex) -> tuple[str, ...]:
    """Those that models are scored on; of a dataset that has neither, all."""
    return tuple(split for split in ("validation", "test") if split in index.splits) or tuple(index.splits)


def add_others(builder: SamplesBuilder, others: Sequence[DatasetIndex], cache: Path) -> None:
    for number, other in enumerate(others):
        wanted = evaluation_splits(other)
        for split, shard, hashes in hashed_shards(other, cache):
            if split in wanted:
                builder.add_other(number, split, shard, hashes)


def num_others(others: Sequence[DatasetIndex]) -> int:
    return sum(other.num_samples(split) for other in others for split in evaluation_splits(other))
