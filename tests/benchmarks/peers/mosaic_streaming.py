"""MosaicML streaming: MDS shards with the files' own bytes, read locally, Pillow's images transformed."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import image_paths, made_once

REQUIREMENTS = ("mosaicml-streaming==0.13.0",)


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    from PIL import Image
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    from tests.benchmarks.peers.transforms import training_transform

    def write(directory: Path) -> None:
        with MDSWriter(out=str(directory), columns={"image": "jpeg", "class": "int"}) as writer:
            for path, label in image_paths(workspace):
                with Image.open(path) as image:
                    writer.write({"image": image, "class": label})

    transform = training_transform(image_size)

    class Photographs(StreamingDataset):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return transform(row["image"].convert("RGB")), row["class"]

    clean_stale_shared_memory()
    directory = made_once(workspace / "mosaic_streaming", write)
    loader = DataLoader(Photographs(local=str(directory), shuffle=True, batch_size=batch_size), batch_size=batch_size)
    while True:
        for images, _ in loader:
            yield len(images)
