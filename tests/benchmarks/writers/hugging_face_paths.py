"""Hugging Face datasets without its image folder: a table of paths, whose files `save_to_disk` embeds."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import image_paths, written

REQUIREMENTS = ("datasets==5.2.0",)


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    from datasets import Dataset, Features, Image, Value

    features = Features({"image": Image(), "label": Value("int64")})
    for directory in written(workspace, "hugging_face_paths"):
        paths, labels = zip(*((str(path), label) for path, label in image_paths(workspace)), strict=True)
        Dataset.from_dict({"image": list(paths), "label": list(labels)}, features=features).save_to_disk(directory)
        yield len(paths)
