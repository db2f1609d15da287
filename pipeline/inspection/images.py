"""The images of an inspection as the model sees them, and what a mask of a person's own covers of each."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.encoders.config import EncoderConfig
from pipeline.errors import DataError, InputError
from pipeline.evaluation.single_images import channels_rule, normalised_views
from pipeline.ingestion.images import decode_image, image_size
from pipeline.inspection.sources import spread
from pipeline.registry.locate import ModelSource
from pipeline.shards.decoding import ImageFault, open_image
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import Sample, node_reader
from pipeline.views.evaluation import evaluation_view

COVERED = 128  # of 255: what is brighter in a mask is covered


def dataset_samples(index: DatasetIndex, split: str, count: int) -> list[Sample]:
    """At most `count` samples, evenly spread over a split."""
    reader = node_reader(index, split)
    places = [(shard, sample) for shard, size in enumerate(reader.shard_sizes) for sample in range(int(size))]
    return [reader.read(*place) for place in spread(places, count)]


def model_views(samples: Sequence[Sample], source: ModelSource) -> Tensor:
    """(B, C, H, W) float32, normalised as the model's training did. InputError names what has other channels."""
    try:
        return normalised_views(samples, source)
    except DataError as error:
        raise InputError(f"IMAGES: {error}") from None


def read_mask(path: str) -> Image.Image:
    """A mask as grey; what is transparent is black. InputError where it is no image."""
    try:
        image = open_image(Path(path).read_bytes())
    except ImageFault as fault:
        raise InputError(f"mask `{path}`: cannot be read as an image: {fault.detail}") from None
    except OSError as error:
        raise InputError(f"mask `{path}`: cannot be read: {error.strerror}") from None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("L")


def covered_pixels(mask: Image.Image, sample: Sample, source: ModelSource) -> Tensor:
    """(H, W) bool: the model's input pixels that the mask covers, stretched over the image and cropped with it."""
    encoder = EncoderConfig.model_validate(source.encoder)
    size = image_size(decode_image(sample.image, channels_rule(encoder.channels)).pixels)
    buffer = io.BytesIO()
    mask.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    out = np.empty((*encoder.input_size, 1), np.uint8)
    crop, crop_mode = source.evaluation_crop or 0.875, source.evaluation_crop_mode
    evaluation_view(buffer.getvalue(), "png", out, crop=crop, crop_mode=crop_mode, mean=(0.0,))
    return torch.from_numpy(out[:, :, 0] >= COVERED)
