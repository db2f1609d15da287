"""A picture of masked images filled in, for objectives that can: what a person looks at when a run has ended."""

import logging

import numpy as np
import torch

from models.inspection.reconstructions import reconstruction_sheet
from pipeline.config.training import TrainingConfig
from pipeline.errors import DataError, FaultError
from pipeline.loading.loader import RawBatch, to_device
from pipeline.rank import Rank
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import node_reader
from pipeline.views.evaluation import evaluation_view
from pipeline.views.pixels import view_dtype

IMAGES = 6
log = logging.getLogger(__name__)


def draw_reconstructions(me: Rank, config: TrainingConfig, module: torch.nn.Module, index: DatasetIndex) -> None:
    """Write reconstructions.png into the run directory; a picture that cannot be drawn decides no run."""
    if not hasattr(module, "reconstruct") or config.zero.stage == 3:  # under ZeRO-3 no rank holds the whole weights
        return
    try:
        views = _views(config, index)
    except (DataError, FaultError, ImageFault) as fault:
        log.warning("reconstructions.png was not drawn: %s", fault)
        return
    numbers = torch.arange(len(views))
    raw = RawBatch(torch.from_numpy(views), numbers, numbers, [], [])
    weight = next(module.parameters())
    images = to_device(raw, weight.device, config.data.mean, config.data.std, weight.dtype).images
    sheet = reconstruction_sheet(module, images, config.data.mean, config.data.std)
    sheet.save(me.run.path / "reconstructions.png")


def _views(config: TrainingConfig, index: DatasetIndex) -> np.ndarray:
    """(B, H, W, C): the first images of a split that was not trained on, where there is one."""
    split = next(name for name in ("test", "validation", config.data.split) if name in index.splits)
    reader, data = node_reader(index, split), config.data
    samples = [reader.read(0, number) for number in range(min(IMAGES, int(reader.shard_sizes[0])))]
    dtype = view_dtype(samples[0].image, samples[0].extension, config.encoder.channels)
    views = np.empty((len(samples), *config.encoder.input_size, config.encoder.channels), dtype)
    for sample, out in zip(samples, views, strict=True):
        evaluation_view(
            sample.image, sample.extension, out,
            crop=data.evaluation_crop, crop_mode=data.evaluation_crop_mode, mean=data.mean,
        )  # fmt: skip
    return views
