"""What of the product's default is decoding: every file read and prepared for its shard, nothing hashed or written."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.our_ingestion import decoded_images

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    return decoded_images(workspace)
