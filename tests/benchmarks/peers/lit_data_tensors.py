"""litdata by its own ImageNet script: torchvision decodes the JPEG to a tensor, and transforms tensors."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.peers import lit_data

REQUIREMENTS = lit_data.REQUIREMENTS


def jpeg_sample(entry: tuple[Path, int]) -> tuple:
    from PIL import Image

    path, label = entry
    return Image.open(path), label


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    from tests.benchmarks.peers.transforms import tensor_transform

    transform = tensor_transform(image_size)

    def view(sample: tuple, *_: object) -> tuple:
        image, label = sample
        return transform(image), label

    return lit_data.streamed(workspace, "lit_data_tensors", jpeg_sample, view, batch_size)
