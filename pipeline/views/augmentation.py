"""From the bytes of an image to a row of the training batch, every random draw from the sample's own generator.

Beside decode and resize an image of 224 pixels costs 60 us, measured between other images: 25 for the generator and its
draws, 20 to 30 for flips, the rest for reading the config.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.config.augmentation import AugmentationConfig
from pipeline.views.colour import recolour
from pipeline.views.geometry import affine, inception_box, letterbox, simple_crop
from pipeline.views.pixels import JPEG_SIGNATURE, decode_pixels, flip, resize_into
from pipeline.views.region import decode_region, region_size


def training_view(
    content: bytes,
    extension: str,
    out: np.ndarray,
    config: AugmentationConfig,
    generator: np.random.Generator,
    *,
    fill: Sequence[float] | None = None,
) -> None:
    """Write a training input into `out`; `fill` is the colour around a letterbox, the dataset's mean, in 0..1.

    Raises ImageFault where the bytes cannot be decoded or do not fit into `out`.

    Shape:
        out: (H, W, C), contiguous; uint8, or float32 as `pixels.view_dtype` says
    """
    if config.crop == "inception":
        resize_into(_inception_crop(content, extension, out.shape[2], config, generator), out)
    else:
        pixels = decode_pixels(content, extension, out.shape[2])
        match config.crop:
            case "simple":
                simple_crop(pixels, out, generator)
            case "whole":
                resize_into(pixels, out)
            case "letterbox":
                letterbox(pixels, out, fill)
    if config.flip and generator.random() < 0.5:
        flip(out)
    if config.moves:
        affine(out, config, generator)
    if config.recolours:
        recolour(out, config, generator)


def _inception_crop(
    content: bytes, extension: str, channels: int, config: AugmentationConfig, generator: np.random.Generator
) -> np.ndarray:
    if config.region_decode and channels == 3 and content.startswith(JPEG_SIGNATURE):
        if (size := region_size(content)) is not None:
            return decode_region(content, inception_box(size, config, generator))
    pixels = decode_pixels(content, extension, channels)
    return inception_box(pixels.shape[:2], config, generator).of(pixels)
