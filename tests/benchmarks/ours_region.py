"""The product's loader with region decode: only the rows and columns of the crop leave the decoder."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks import ours

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    return ours.batches(workspace, batch_size, image_size, num_images, region_decode=True)
