"""The product's ingestion at its defaults: every image decoded to its last pixel."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.our_ingestion import ingestions

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    return ingestions(workspace, "ours_pixels")
