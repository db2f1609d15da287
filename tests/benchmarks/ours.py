"""The product's loader at its defaults: our shards, read and checked, to augmented uint8 batches."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.our_loader import our_batches, our_config, our_dataset

REQUIREMENTS = ()


def batches(
    workspace: Path, batch_size: int, image_size: int, num_images: int, region_decode: bool = False
) -> Iterator[int]:
    index = our_dataset(workspace)
    config = our_config(index, batch_size, image_size, region_decode=region_decode)
    while True:
        for batch in our_batches(config, index, first_step=0, last_step=num_images // batch_size):
            yield len(batch.images)
