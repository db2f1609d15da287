"""The product's loader as the benchmarks use it: the one place that knows its API."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.config.plan import plan_batches
from pipeline.config.training import PretrainConfig
from pipeline.ingestion.build import ingest
from pipeline.loading.loader import Loader, RawBatch
from pipeline.loading.stream import SampleStream
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.shards.order import SampleOrder, default_lanes, default_window_shards
from pipeline.shards.reader import ShardReader
from pipeline.views.geometry import inception_box
from pipeline.views.sample_generator import sample_generator

WINDOW_BYTES = 1 << 30  # what `vit pretrain` gives a window by default


class View(NamedTuple):
    """What one training input is made of: the bytes of the image, the box (left, top, right, bottom) and the mirror."""

    content: bytes
    box: tuple[int, int, int, int]
    flip: bool


def our_dataset(workspace: Path) -> DatasetIndex:
    """The files of a workspace as a dataset directory; what an earlier run finished is kept."""
    directory = workspace / "shards"
    ingest(str(workspace / "files"), directory, IngestConfig(samples_per_shard=250))
    return read_index(directory)


def our_config(
    index: DatasetIndex, batch_size: int, image_size: int, *, region_decode: bool = False, **data: object
) -> PretrainConfig:
    """Inception crop and flip at the defaults; `data` are keys of DataConfig."""
    shard_bytes = [shard.bytes for shard in index.shards("train")]
    augmentation = {"region_decode": True} if region_decode else {}
    return PretrainConfig.model_validate(
        {
            "encoder": {"name": "vit_s16", "image_size": image_size},
            "objective": {"kind": "mae"},
            "augmentation": augmentation,
            "data": {
                "sources": [{"path": str(index.directory)}],
                "lanes": default_lanes(batch_size),
                "window_shards": default_window_shards(shard_bytes, WINDOW_BYTES),
                **data,
            },
            "optimizer": {"learning_rate": 1e-3},
            "zero": {"stage": 0},
            "global_batch_size": batch_size,
            "micro_batch_size": batch_size,
            "epochs": 1,
        }
    )


def our_batches(
    config: PretrainConfig, index: DatasetIndex, *, first_step: int, last_step: int, workers: int = 0
) -> Iterator[RawBatch]:
    """The batches of steps [first_step, last_step) of a single rank, from a fresh stream."""
    plan = plan_batches(config.global_batch_size, config.micro_batch_size, world_size=1)
    stream = SampleStream(config, [index])
    with Loader(stream, plan, rank=0, first_step=first_step, last_step=last_step, workers=workers) as loader:
        yield from loader


def our_order(config: PretrainConfig, index: DatasetIndex) -> SampleOrder:
    return SampleOrder(
        [shard.samples for shard in index.shards("train")],
        global_batch_size=config.global_batch_size,
        lanes=config.data.lanes,
        window_shards=config.data.window_shards,
        seed=config.seed,
    )


def drawn_views(config: PretrainConfig, index: DatasetIndex, num_views: int) -> list[View]:
    """What the loader makes its first training inputs of, in their order."""
    reader = ShardReader(index, "train")
    positions = np.arange(num_views)
    _, shards, samples = our_order(config, index).locate_many(positions)
    return [
        _drawn_view(config, reader.read(int(shard), int(sample)).image, int(position))
        for position, shard, sample in zip(positions, shards, samples, strict=True)
    ]


def passes_over_views(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[list[View]]:
    """Batches of what the loader makes `num_images` training inputs of, over and over: what the limits work on."""
    index = our_dataset(workspace)
    views = drawn_views(our_config(index, batch_size, image_size), index, num_images)
    while True:
        for start in range(0, num_images, batch_size):
            yield views[start : start + batch_size]


def _drawn_view(config: PretrainConfig, content: bytes, position: int) -> View:
    generator = sample_generator(config.seed, position, "augment")
    width, height = Image.open(io.BytesIO(content)).size
    box = inception_box((height, width), config.augmentation, generator)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    return View(content, corners, bool(generator.random() < 0.5))
