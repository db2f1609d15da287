"""MosaicML streaming: MDS shards of its MDSWriter, images as its documentation writes them: opened, not decoded."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import image_paths, written

REQUIREMENTS = ("mosaicml-streaming==0.13.0",)


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    from PIL import Image
    from streaming import MDSWriter

    for directory in written(workspace, "mosaic_streaming"):
        paths = image_paths(workspace)
        with MDSWriter(out=str(directory), columns={"image": "jpeg", "class": "int"}) as writer:
            for path, label in paths:
                with Image.open(path) as image:
                    writer.write({"image": image, "class": label})
        yield len(paths)
