"""The product's ingestion at its defaults: every image decoded, hashed by its pixels and perceptually, certified."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.our_ingestion import ingestions

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    return ingestions(workspace, "ours_pixels")
