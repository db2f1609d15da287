"""Micro-batches of a run: positions in, augmented uint8 images out. The batch carries the positions it came from.

The stream is a pure function of (index, seed, position); workers and ranks only decide who does the work.
"""

import ctypes
import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.objectives.batch import Batch
from pipeline.config.plan import BatchPlan
from pipeline.config.training import TrainingConfig
from pipeline.loading.augmentation import training_view
from pipeline.loading.pixels import view_dtype
from pipeline.loading.sample_generator import sample_generator
from pipeline.loading.selection import Selection
from pipeline.shards.index import DatasetIndex
from pipeline.shards.order import SampleOrder
from pipeline.shards.reader import ShardReader

_PR_SET_PDEATHSIG = 1


class RawBatch(NamedTuple):
    """One micro-batch as the loader makes it, on the host."""

    images: Tensor  # (B, H, W, C) uint8, or float32 in 0..1
    labels: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64
    keys: list[str]


class PositionDataset(Dataset):
    """Maps an array of positions to a RawBatch."""

    def __init__(self, config: TrainingConfig, index: DatasetIndex):
        self.config = config
        self.reader = ShardReader(index, config.data.split)
        self.selection = Selection.of(self.reader, config.data.label_fraction)
        self.order = SampleOrder(
            self.selection.shard_sizes,
            global_batch_size=config.global_batch_size,
            lanes=config.data.lanes,
            window_shards=config.data.window_shards,
            seed=config.seed,
        )
        sample = self.reader.read(0, 0)
        self.dtype = view_dtype(sample.image, sample.extension, config.encoder.channels)

    def __getitem__(self, positions: np.ndarray) -> RawBatch:
        _, shards, places = self.order.locate_many(positions)
        config = self.config
        images = np.empty((len(positions), *config.encoder.input_size, config.encoder.channels), self.dtype)
        labels = np.empty(len(positions), np.int64)
        keys = []
        for row, (position, shard, place) in enumerate(zip(positions, shards, places, strict=True)):
            sample = self.reader.read(int(shard), self.selection.sample(int(shard), int(place)))
            generator = sample_generator(config.seed, int(position), "augment")
            training_view(
                sample.image, sample.extension, images[row], config.augmentation, generator, fill=config.data.mean
            )
            labels[row] = sample.label
            keys.append(sample.key)
        return RawBatch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(positions), keys)


def micro_batch_positions(plan: BatchPlan, rank: int, first_step: int, last_step: int) -> Iterator[np.ndarray]:
    """Positions of each micro-batch of `rank`, step after step.

    A rank takes its contiguous slice of each global batch, and cuts it into micro-batches.
    """
    share = plan.global_batch_size // plan.world_size
    for step in range(first_step, last_step):
        start = step * plan.global_batch_size + rank * share
        for offset in range(0, share, plan.micro_batch_size):
            yield np.arange(start + offset, start + offset + plan.micro_batch_size, dtype=np.int64)


def training_batches(
    dataset: PositionDataset, plan: BatchPlan, *, rank: int, first_step: int, last_step: int, workers: int
) -> Iterator[RawBatch]:
    """The micro-batches of steps [first_step, last_step) of one rank, prefetched by `workers` processes."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Positions(plan, rank, first_step, last_step),
        num_workers=workers,
        worker_init_fn=_detach_worker if workers else None,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if workers else None,
    )
    return iter(loader)


class _Positions:
    """`micro_batch_positions` as an object that a DataLoader can iterate and size."""

    def __init__(self, plan: BatchPlan, rank: int, first_step: int, last_step: int):
        self.arguments = (plan, rank, first_step, last_step)

    def __iter__(self) -> Iterator[np.ndarray]:
        return micro_batch_positions(*self.arguments)

    def __len__(self) -> int:
        plan, _, first_step, last_step = self.arguments
        return (last_step - first_step) * plan.gradient_accumulation_steps


def _detach_worker(worker: int) -> None:
    """A stop request is the rank's to answer; a worker that dies of it would take the checkpoint with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)


def to_device(raw: RawBatch, device: torch.device, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Batch:
    """The batch on the device, channels first, uint8 0..255 scaled to 0..1 and normalised, float32."""
    images = raw.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    images = images.float().div_(255) if raw.images.dtype == torch.uint8 else images
    mean_tensor = torch.tensor(mean, device=device).view(1, -1, 1, 1)
    deviation_tensor = torch.tensor(deviation, device=device).view(1, -1, 1, 1)
    images = ((images - mean_tensor) / deviation_tensor).contiguous()
    return Batch(images, raw.labels.to(device, non_blocking=True), raw.positions.to(device, non_blocking=True))
