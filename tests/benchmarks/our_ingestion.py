"""The product's ingestion as its benchmark runs it: the one place that knows its API.

Shard jobs run in the contestant's own process and not in the children that `vit ingest` starts: like that of every
contestant, their start is no part of what is measured. What happens to each file is the same.
"""

from collections.abc import Iterator
from pathlib import Path

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion import build, making
from pipeline.ingestion.images import prepare_image
from tests.benchmarks.workspace import SAMPLES_PER_SHARD, image_paths, written


def ingestions(workspace: Path, name: str, **settings: object) -> Iterator[int]:
    """One whole ingestion of a workspace's files after the other, each into a new dataset directory."""
    making.in_isolation = lambda run, jobs, *_: (run(job) for job in jobs)
    config = IngestConfig(samples_per_shard=SAMPLES_PER_SHARD, workers=1, **settings)
    for directory in written(workspace, name):
        report = build.ingest(str(workspace / "files"), directory, config)
        yield sum(report.samples.values())


def decoded_images(workspace: Path) -> Iterator[int]:
    """Passes over a workspace's files, each read and decoded to its last pixel."""
    while True:
        paths = image_paths(workspace)
        for path, _ in paths:
            prepare_image(path.read_bytes(), "rgb")
        yield len(paths)
