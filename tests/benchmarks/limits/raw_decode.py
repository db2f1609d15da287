"""The limit: a full, accurate decode of the same JPEG bytes from memory, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import simplejpeg

from tests.benchmarks.our_loader import drawn_views, our_config, our_dataset

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    index = our_dataset(workspace)
    views = drawn_views(our_config(index, batch_size, image_size), index, num_images)
    while True:
        for start in range(0, num_images, batch_size):
            for view in views[start : start + batch_size]:
                simplejpeg.decode_jpeg(view.content)
            yield len(views[start : start + batch_size])
