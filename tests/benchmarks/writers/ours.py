"""The product's ingestion at `examine: header`: listing, shards with a SHA-256 per sample and per shard, index."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.our_ingestion import ingestions

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    return ingestions(workspace, "ours", examine="header")
