"""MosaicML streaming without a look at the images: MDS shards of the bytes as they come."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import image_paths, written

REQUIREMENTS = ("mosaicml-streaming==0.13.0",)


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    from streaming import MDSWriter

    for directory in written(workspace, "mosaic_bytes"):
        paths = image_paths(workspace)
        with MDSWriter(out=str(directory), columns={"image": "bytes", "class": "int"}) as writer:
            for path, label in paths:
                writer.write({"image": path.read_bytes(), "class": label})
        yield len(paths)
