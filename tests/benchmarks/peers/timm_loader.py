"""timm: `create_dataset` over folders and `create_loader`, whose batches are uint8; it normalises on the device.

The prefetcher's device half (copy, normalise) is left out: its inner loader ends where ours ends.
"""

from collections.abc import Iterator
from pathlib import Path

REQUIREMENTS = ()  # timm is a dependency of the project


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    import torch
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=workspace / "files", split="train"),
        input_size=(3, image_size, image_size),
        batch_size=batch_size,
        is_training=True,
        interpolation="bicubic",
        color_jitter=0.0,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    while True:
        for images, _ in loader.loader:
            assert images.dtype == torch.uint8
            yield len(images)
