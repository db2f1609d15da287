"""Pooled features, labels and the model's own predictions for every sample of a split, exactly once each."""

import logging
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.encoders.timm_config import read_encoder
from models.encoders.vit import Encoder
from pipeline.errors import DataError
from pipeline.registry.locate import ModelSource
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import Sample, ShardReader, node_reader
from pipeline.views.evaluation import evaluation_view

log = logging.getLogger(__name__)


class SplitFeatures(NamedTuple):
    """Rows in the order of the split's shards and samples."""

    features: Tensor  # (S, D) float32
    logits: Tensor  # (S, V) float32; V is 0 for a model without a head
    labels: Tensor  # (S,) int64


def pooled_features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of a ViT's patch tokens after the final norm, whatever its own pooling, or what another network's head
    reads; and the model's logits.

    Shape:
        images: (B, C, H, W) float, normalised
        returns: (B, D), (B, V)
    """
    tokens = model.forward_features(images)
    if isinstance(model, Encoder):
        features = model.fc_norm(tokens[:, model.num_prefix_tokens :].mean(dim=1))
    else:
        features = model.forward_head(tokens, pre_logits=True)
    has_head = model.num_classes > 0
    logits = model.forward_head(tokens) if has_head else features.new_zeros(len(features), 0)
    return features, logits


@torch.inference_mode()
def extract_features(
    model: nn.Module, source: ModelSource, index: DatasetIndex, split: str, *, batch_size: int,
    rank: int, world_size: int, folder: Path,
) -> SplitFeatures | None:  # fmt: skip
    """All rows on rank 0, None elsewhere. Collective: every rank must call it.

    Ranks take contiguous, unequal parts and never pad; rank 0 asserts that the rows are as many as the index says.
    """
    reader = node_reader(index, split)
    places = [(shard, sample) for shard, size in enumerate(reader.shard_sizes) for sample in range(int(size))]
    mine = np.array_split(np.arange(len(places)), world_size)[rank]
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    started = time.monotonic()
    for start in range(0, len(mine), batch_size):
        chosen = [places[i] for i in mine[start : start + batch_size]]
        images, labels = _read(reader, chosen, source)
        features, logits = pooled_features(model, images.to(next(model.parameters()).device))
        rows.append((features.float().cpu(), logits.float().cpu(), labels))
        if time.monotonic() - started > 10:
            started = time.monotonic()
            log.info("%s: %d of %d images", split, start + len(chosen), len(mine))
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{split}-rank-{{:05d}}.safetensors"
    save_file(_columns(rows, model), folder / name.format(rank))
    if world_size > 1:
        dist.barrier()
    if rank != 0:
        return None
    parts = [load_file(folder / name.format(other)) for other in range(world_size)]
    merged = SplitFeatures(*(torch.cat([part[key] for part in parts]) for key in SplitFeatures._fields))
    if len(merged.labels) != index.num_samples(split):
        counts = f"{len(merged.labels):,} samples were evaluated, the index says {index.num_samples(split):,}"
        raise RuntimeError(f"{index.directory}: {split}: {counts}; this is a defect of the program")
    return merged


def _read(reader: ShardReader, chosen: list[tuple[int, int]], source: ModelSource) -> tuple[Tensor, Tensor]:
    samples = [reader.read(shard, sample) for shard, sample in chosen]
    images = torch.stack([unit_view(sample, source) for sample in samples]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (source.mean, source.std))
    return (images - mean) / std, torch.tensor([sample.label for sample in samples])


def unit_view(sample: Sample, source: ModelSource) -> Tensor:
    """(H, W, C) float32 in 0..1, each sample at its own depth; DataError where it cannot be decoded."""
    encoder = read_encoder(source.encoder)
    crop, crop_mode = source.evaluation_crop or 0.875, source.evaluation_crop_mode
    for dtype in (np.uint8, np.float32):
        out = np.empty((*encoder.input_size, encoder.channels), dtype)
        try:
            evaluation_view(sample.image, sample.extension, out, crop=crop, crop_mode=crop_mode, mean=source.mean)
        except ImageFault as fault:
            if dtype == np.uint8 and fault.reason == "unsupported_mode":
                continue  # deeper than eight bits, perhaps
            detail = f"{sample.shard}: sample `{sample.key}`: cannot be evaluated ({fault.detail})"
            raise DataError(detail, cause="undecodable", shard=sample.shard, key=sample.key) from None
        view = torch.from_numpy(out).float()
        return view / 255 if dtype == np.uint8 else view


def _columns(rows: list[tuple[Tensor, Tensor, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    """The rows as one tensor per column; a rank without samples writes empty ones."""
    if not rows:
        width = model.head_hidden_size
        empty = (torch.zeros(0, width), torch.zeros(0, model.num_classes), torch.zeros(0, dtype=torch.int64))
        rows = [empty]
    return {key: torch.cat([row[i] for row in rows]).contiguous() for i, key in enumerate(SplitFeatures._fields)}
