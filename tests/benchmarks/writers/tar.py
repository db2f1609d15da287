"""The limit: `tar cf` on the same files, which copies them and checks nothing."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import image_paths, written

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    num_images = len(image_paths(workspace))
    for directory in written(workspace, "tar"):
        directory.mkdir()
        subprocess.run(["tar", "cf", str(directory / "files.tar"), "files"], cwd=workspace, check=True)
        yield num_images
