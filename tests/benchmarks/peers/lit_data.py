"""litdata: optimized chunks with the files' own bytes, opened by Pillow and transformed."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.workspace import image_paths, made_once

REQUIREMENTS = ("litdata==0.2.76",)
CHUNK_BYTES = "64MB"  # its default


def raw_sample(entry: tuple[Path, int]) -> tuple[bytes, int]:
    path, label = entry
    return path.read_bytes(), label


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    from PIL import Image

    from tests.benchmarks.peers.transforms import training_transform

    transform = training_transform(image_size)

    def view(sample: tuple[bytes, int], *_: object) -> tuple:
        content, label = sample
        return transform(Image.open(io.BytesIO(content)).convert("RGB")), label

    return streamed(workspace, "lit_data", raw_sample, view, batch_size)


def streamed(workspace: Path, name: str, write: Callable, view: Callable, batch_size: int) -> Iterator[int]:
    """Batch sizes of the dataset that `write` makes of each file, each sample through `view`."""
    import litdata

    def optimize(directory: Path) -> None:
        litdata.optimize(
            fn=write,
            inputs=image_paths(workspace),
            output_dir=str(directory),
            chunk_bytes=CHUNK_BYTES,
            num_workers=1,
            start_method="fork",
        )

    directory = made_once(workspace / name, optimize)
    dataset = litdata.StreamingDataset(str(directory), shuffle=True, transform=view)
    loader = litdata.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=0)
    while True:
        for images, _ in loader:
            yield len(images)
