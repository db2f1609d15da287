"""Hugging Face datasets: images embedded in Arrow files, a transform set on the dataset, PyTorch's DataLoader."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import made_once

REQUIREMENTS = ("datasets==5.2.0",)


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    import torch
    from datasets import load_dataset, load_from_disk
    from torch.utils.data import DataLoader

    from tests.benchmarks.peers.transforms import training_transform

    def write(directory: Path) -> None:
        cache = directory.with_name("hugging_face-cache")
        folders = load_dataset("imagefolder", data_dir=str(workspace / "files"), split="train", cache_dir=str(cache))
        folders.save_to_disk(str(directory))

    transform = training_transform(image_size)

    def transforms(rows: dict[str, list]) -> dict[str, list]:
        return {"image": [transform(image.convert("RGB")) for image in rows["image"]], "label": rows["label"]}

    def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([row["image"] for row in rows]), torch.tensor([row["label"] for row in rows])

    dataset = load_from_disk(str(made_once(workspace / "hugging_face", write))).with_transform(transforms)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, collate_fn=collate)
    while True:
        for images, _ in loader:
            yield len(images)
