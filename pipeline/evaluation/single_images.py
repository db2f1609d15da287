"""A few images as inputs of a model, without a dataset around them: for pictures, queries and examples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError, InputError
from pipeline.evaluation.features import evaluation_input_of
from pipeline.ingestion.images import prepare_image
from pipeline.registry.locate import ModelSource
from pipeline.shards.decoding import ImageFault
from pipeline.shards.reader import Sample


def channels_rule(channels: int) -> str:
    """The rule of ingestion for channels under which images of so many can be read."""
    return "rgb" if channels in (1, 3) else "keep"


def file_samples(paths: Sequence[str], channels: int, *, named: str) -> list[Sample]:
    """Image files as samples, upright and decodable as ingestion makes them. InputError names the one that is not, and
    what it was given as (`named`)."""
    samples = []
    for path in paths:
        try:
            prepared = prepare_image(Path(path).read_bytes(), channels_rule(channels))
        except ImageFault as fault:
            raise InputError(f"{named} `{path}`: cannot be read as an image: {fault.detail}; leave it out") from None
        except OSError as error:
            raise InputError(f"{named} `{path}`: cannot be read: {error.strerror}; leave it out") from None
        samples.append(Sample(Path(path).name, prepared.content, prepared.extension, -1, path))
    return samples


def unit_view(sample: Sample, source: ModelSource) -> Tensor:
    """(H, W, C) float32 in 0..1, each sample at its own depth; DataError where it cannot be decoded."""
    inputs = evaluation_input_of(source)
    for dtype in (np.uint8, np.float32):
        out = np.empty((*inputs.size, inputs.channels), dtype)
        try:
            inputs.write(sample.image, sample.extension, out)
        except ImageFault as fault:
            if dtype == np.uint8 and fault.reason == "unsupported_mode":
                continue  # deeper than eight bits, perhaps
            detail = f"{sample.shard}: sample `{sample.key}`: cannot be evaluated ({fault.detail})"
            raise DataError(detail, cause="undecodable", shard=sample.shard, key=sample.key) from None
        view = torch.from_numpy(out).float()
        return view / 255 if dtype == np.uint8 else view


def normalised_views(samples: Sequence[Sample], source: ModelSource) -> Tensor:
    """(B, C, H, W) float32, normalised as the model's training did; DataError names what cannot be decoded."""
    views = torch.stack([unit_view(sample, source) for sample in samples]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (source.mean, source.std))
    return (views - mean) / std
