"""Pooled features, labels and the model's own scores for every sample of a split, exactly once each."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.encoders.timm_config import read_encoder
from models.encoders.vit import Encoder
from pipeline.config.plan import BatchPlan
from pipeline.loading.evaluation_stream import Alteration, EvaluationStream
from pipeline.loading.left_out import num_scored
from pipeline.loading.loader import Loader, to_device
from pipeline.registry.locate import ModelSource
from pipeline.shards.index import DatasetIndex
from pipeline.views.evaluation import EvaluationInput

TOLD_EVERY_SECONDS = 10.0


class SplitFeatures(NamedTuple):
    """Rows in the order of the split's shards and samples."""

    features: Tensor  # (S, D) float32
    logits: Tensor  # (S, V) float32; V is 0 for a model without a head
    labels: Tensor  # (S,) int64


@dataclass(frozen=True)
class Extraction:
    """Where and how features are made: this rank's part of the work, the same on all ranks but for `rank`."""

    rank: int
    world_size: int
    device: torch.device
    batch_size: int  # images per rank per forward
    workers: int  # processes that decode, per rank
    precision: str  # fp32 | bf16
    folder: Path  # on a file system of all ranks: their parts, until rank 0 has put them together
    tell: object = print  # told how far it is


def evaluation_input_of(source: ModelSource) -> EvaluationInput:
    """How images become inputs of a located model."""
    encoder = read_encoder(source.encoder)
    return EvaluationInput(
        encoder.input_size, encoder.channels, source.evaluation_crop or 0.875, source.evaluation_crop_mode, source.mean
    )  # fmt: skip


def features_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, D): the mean of a ViT's patch tokens after the final norm, whatever its own pooling, or what another
    network's head reads. `tokens` are what `forward_features` gives."""
    if isinstance(model, Encoder):
        return model.fc_norm(tokens[:, model.num_prefix_tokens :].mean(dim=1))
    return model.forward_head(tokens, pre_logits=True)


def pooled_features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """`features_of` the images, and the model's logits.

    Shape:
        images: (B, C, H, W) float, normalised
        returns: (B, D), (B, V)
    """
    tokens = model.forward_features(images)
    features = features_of(model, tokens)
    has_head = model.num_classes > 0
    logits = model.forward_head(tokens) if has_head else features.new_zeros(len(features), 0)
    return features, logits


def extract_features(
    model: nn.Module, source: ModelSource, index: DatasetIndex, split: str, how: Extraction,
    alter: Alteration | None = None, *, head: bool = True,
) -> SplitFeatures | None:  # fmt: skip
    """All rows on rank 0, None elsewhere; without `head` logits are left out. Collective: every rank must call it.

    Batches are padded to be as many on every rank, and what is padding is left out; rank 0 asserts that there are as
    many rows as the index says, but for those on the tombstone list.
    """
    rows = [
        (positions, features, logits if head else logits[:, :0], labels)
        for positions, labels, (features, logits) in each_batch(model, source, index, split, how, alter)
    ]
    columns = [torch.cat(column).contiguous() for column in zip(*rows, strict=True)]
    names = ("positions", *SplitFeatures._fields[:2], "labels")
    merged = gathered(dict(zip(names, columns, strict=True)), f"{split}", how)
    if merged is None:
        return None
    if len(merged["labels"]) != (expected := num_scored(index, split)):
        counts = f"{len(merged['labels']):,} samples were evaluated, the index says {expected:,}"
        raise RuntimeError(f"{index.directory}: {split}: {counts}; this is a defect of the program")
    return SplitFeatures(merged["features"], merged["logits"], merged["labels"])


@torch.inference_mode()
def each_batch(
    model: nn.Module, source: ModelSource, index: DatasetIndex, split: str, how: Extraction,
    alter: Alteration | None = None, make: Callable[[nn.Module, Tensor], tuple[Tensor, ...]] = pooled_features,
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:  # fmt: skip
    """(positions, labels, what `make` makes, in float32) of this rank's samples, on the host; by default pooled
    features and logits."""
    stream = EvaluationStream(
        [index], split, how.batch_size * how.world_size, evaluation_input_of(source), index.classes, alter
    )  # fmt: skip
    plan = BatchPlan(how.batch_size * how.world_size, how.batch_size, how.world_size, 1)
    told = time.monotonic()
    with Loader(stream, plan, rank=how.rank, first_step=0, last_step=stream.batches, workers=how.workers) as loader:
        for number, raw in enumerate(loader):
            batch = to_device(raw, how.device, source.mean, source.std, torch.float32)
            with torch.autocast(how.device.type, torch.bfloat16, enabled=how.precision == "bf16"):
                made = make(model, batch.images)
            real = raw.positions < stream.num_samples
            yield raw.positions[real], raw.labels[real], tuple(one.float().cpu()[real] for one in made)
            if time.monotonic() - told > TOLD_EVERY_SECONDS:
                told = time.monotonic()
                how.tell(f"{split}: {min((number + 1) * plan.global_batch_size, stream.num_samples):,} of "
                         f"{stream.num_samples:,} images")  # fmt: skip


def gathered(columns: dict[str, Tensor], name: str, how: Extraction) -> dict[str, Tensor] | None:
    """The rows of all ranks in the order of their positions, on rank 0; None elsewhere. Collective.

    A rank may have several rows of a position, or none at all.
    """
    if how.world_size > 1:
        how.folder.mkdir(parents=True, exist_ok=True)
        files = [how.folder / f"{name}-rank-{rank:05d}.safetensors" for rank in range(how.world_size)]
        save_file(columns, files[how.rank])
        dist.barrier()
        if how.rank == 0:
            parts = [load_file(file) for file in files]
            columns = {key: torch.cat([part[key] for part in parts]) for key in columns}
            for file in files:
                file.unlink()
        dist.barrier()
    if how.rank != 0:
        return None
    order = columns["positions"].argsort(stable=True)
    return {key: column[order] for key, column in columns.items()}
