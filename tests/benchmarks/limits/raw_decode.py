"""The limit: a full, accurate decode of the same JPEG bytes from memory, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import simplejpeg

from tests.benchmarks.our_loader import passes_over_views

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    for views in passes_over_views(workspace, batch_size, image_size, num_images):
        for view in views:
            simplejpeg.decode_jpeg(view.content)
        yield len(views)
