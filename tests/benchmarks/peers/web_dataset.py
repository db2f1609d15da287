"""webdataset: tars of its own ShardWriter, a shuffle buffer, Pillow decoding, batches made in the pipeline."""

from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.workspace import image_paths, made_once

REQUIREMENTS = ()  # webdataset is a dependency of the project
SAMPLES_PER_SHARD = 250
SHUFFLE_BUFFER = 1000  # as its examples


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    import webdataset as wds

    from tests.benchmarks.peers.transforms import training_transform

    def write(directory: Path) -> None:
        directory.mkdir()
        with wds.ShardWriter(f"{directory}/%06d.tar", maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
            for number, (path, label) in enumerate(image_paths(workspace)):
                writer.write({"__key__": f"{number:06d}", "jpg": path.read_bytes(), "cls": label})

    shards = sorted(map(str, made_once(workspace / "webdataset", write).glob("*.tar")))
    transform = training_transform(image_size)
    dataset = (
        wds.WebDataset(shards, shardshuffle=100)
        .shuffle(SHUFFLE_BUFFER)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, lambda label: label)
        .batched(batch_size)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=0)
    while True:
        for images, _ in loader:
            yield len(images)
