"""A dataset that is an index alone, for questions about order at a size that no disk here holds."""

import hashlib
from pathlib import Path

import numpy as np

from pipeline.shards.index import DatasetIndex, ImageStatistics, Shard, write_index

BYTES_PER_SAMPLE = 110_000  # ImageNet's mean file


def synthetic_index(directory: Path, num_shards: int, samples_per_shard: int) -> DatasetIndex:
    """An index.json of `num_shards` shards that are not there, written to `directory`; sizes vary by a fifth."""
    factors = np.random.Generator(np.random.Philox(0)).uniform(0.8, 1.2, num_shards)
    shards = tuple(
        Shard(
            name=f"train-{number:06d}.tar",
            bytes=int(samples_per_shard * BYTES_PER_SAMPLE * factor),
            sha256=hashlib.sha256(str(number).encode()).hexdigest(),
            samples=samples_per_shard,
            labelled=samples_per_shard,
        )
        for number, factor in enumerate(factors)
    )
    statistics = ImageStatistics((0.5,) * 3, (0.25,) * 3, BYTES_PER_SAMPLE, (500, 500, 500), (375, 375, 375))
    directory.mkdir(parents=True, exist_ok=True)
    index = DatasetIndex(directory, "0" * 64, {"train": shards}, None, statistics)
    write_index(index)
    return index
