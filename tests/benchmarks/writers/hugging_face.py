"""Hugging Face datasets: its image folder, as its documentation loads one, saved by `save_to_disk`."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import written

REQUIREMENTS = ("datasets==5.2.0",)


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    from datasets import load_dataset

    for directory in written(workspace, "hugging_face"):
        cache = str(directory.with_name(f"{directory.name}-cache"))
        images = load_dataset("imagefolder", data_dir=str(workspace / "files"), split="train", cache_dir=cache)
        images.save_to_disk(directory)
        yield len(images)
