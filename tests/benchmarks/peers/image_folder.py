"""torchvision: `ImageFolder` and PyTorch's DataLoader."""

from collections.abc import Iterator
from pathlib import Path

REQUIREMENTS = ()  # torchvision is a dependency of the project


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from tests.benchmarks.peers.transforms import training_transform

    dataset = ImageFolder(workspace / "files" / "train", training_transform(image_size))
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    while True:
        for images, _ in loader:
            yield len(images)
