"""webdataset: tars of its own ShardWriter with the files' bytes and their labels."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import SAMPLES_PER_SHARD, image_paths, written

REQUIREMENTS = ()  # webdataset is a dependency of the project


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    import webdataset as wds

    for directory in written(workspace, "web_dataset"):
        directory.mkdir()
        paths = image_paths(workspace)
        with wds.ShardWriter(f"{directory}/%06d.tar", maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
            for number, (path, label) in enumerate(paths):
                writer.write({"__key__": f"{number:06d}", "jpg": path.read_bytes(), "cls": label})
        yield len(paths)
