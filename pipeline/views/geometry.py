"""Which part of an image becomes the input, and how it lies in it. Sizes are (height, width), pixels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.config.augmentation import AugmentationConfig
from pipeline.views.pixels import resize_into

_LONGEST_RATIO = 64
_REFLECTED = 4  # pixels around the image before a simple random crop: DeiT III's


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """The rectangle of an (H, W, C) array, a view."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def inception_box(size: tuple[int, int], config: AugmentationConfig, generator: np.random.Generator) -> Box:
    """An Inception crop (arXiv:1409.4842, section 6): area and log-ratio uniform, place uniform.

    After ten misses the largest centred box within the ratio bounds is taken, as torchvision does.
    """
    height, width = size
    draw = generator.random  # the quickest draw there is: 0.3 us
    (least, most), (narrow, wide) = config.crop_scale, config.crop_ratio
    for _ in range(10):
        area = height * width * (least + (most - least) * draw())
        ratio = narrow * (wide / narrow) ** draw()
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(draw() * (height - crop_height + 1)), int(draw() * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    ratio = min(max(width / height, narrow), wide)
    crop_height, crop_width = min(height, round(width / ratio)), min(width, round(height * ratio))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, max(crop_height, 1), max(crop_width, 1))


def simple_crop(pixels: np.ndarray, out: np.ndarray, generator: np.random.Generator) -> None:
    """Resize to cover `out` with the ratio kept, pad in reflection, crop at random (arXiv:2204.07118, section 3)."""
    height, width = out.shape[:2]
    pixels = without_far_ends(pixels)
    resized = np.empty((*_covering(pixels.shape[:2], (height, width)), out.shape[2]), out.dtype)
    resize_into(pixels, resized)
    around = min(_REFLECTED, min(resized.shape[:2]) - 1)  # a reflection needs as many pixels inside
    padded = np.pad(resized, ((around, around), (around, around), (0, 0)), mode="reflect")
    top, left = (int(generator.random() * (padded.shape[axis] - out.shape[axis] + 1)) for axis in (0, 1))
    out[...] = padded[top : top + height, left : left + width]


def without_far_ends(pixels: np.ndarray) -> np.ndarray:
    """The middle of an image that is more than 64 times as long as wide, for those who would resize the whole of it.

    A line of 12,000 x 1 pixels that covers a square of 224 is 1.8 GB large.
    """
    longest = _LONGEST_RATIO * min(pixels.shape[:2])
    top, left = (max(0, side - longest) // 2 for side in pixels.shape[:2])
    return pixels[top : top + longest, left : left + longest]


def _covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size of the smallest resized image that covers the target; the longer side rounds down, as torchvision's."""
    if target[0] * size[1] >= target[1] * size[0]:  # the height decides
        return target[0], size[1] * target[0] // size[0]
    return size[0] * target[1] // size[1], target[1]


def letterbox(pixels: np.ndarray, out: np.ndarray, fill: Sequence[float] | None) -> None:
    """Resize to fit into `out` with the ratio kept, centred; around it `fill`, per channel in 0..1 (None: one half)."""
    target, size = out.shape[:2], pixels.shape[:2]
    height, width = fitting_size(size, target)
    colour = np.full(out.shape[2], 0.5, np.float32) if fill is None else np.asarray(fill, np.float32)
    out[...] = np.round(colour * 255) if out.dtype == np.uint8 else colour
    inner = np.empty((height, width, out.shape[2]), out.dtype)
    resize_into(pixels, inner)
    Box((target[0] - height) // 2, (target[1] - width) // 2, height, width).of(out)[...] = inner


def fitting_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The size of an image resized to fit into the target with its ratio kept, rounded as timm rounds."""
    ratio = max(size[0] / target[0], size[1] / target[1])
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def affine(out: np.ndarray, config: AugmentationConfig, generator: np.random.Generator) -> None:
    """Rotate, scale and shift about the centre, in place; what that uncovers takes the colour of the corner."""
    height, width = out.shape[:2]
    angle = math.radians(generator.uniform(-1, 1) * config.affine_degrees)
    scale = 1 + generator.uniform(-1, 1) * config.affine_scale
    shift_x, shift_y = (generator.uniform(-1, 1) * config.affine_shift * side for side in (width, height))
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    centre_x, centre_y = width / 2, height / 2
    matrix = (
        cosine, sine, centre_x - cosine * (centre_x + shift_x) - sine * (centre_y + shift_y),
        -sine, cosine, centre_y + sine * (centre_x + shift_x) - cosine * (centre_y + shift_y),
    )  # fmt: skip
    whole = out.dtype == np.uint8 and out.shape[2] == 3
    for part in [out] if whole else [out[:, :, channel] for channel in range(out.shape[2])]:
        image = Image.fromarray(np.ascontiguousarray(part))
        corner = image.getpixel((0, 0))
        moved = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=corner)
        part[...] = np.asarray(moved)
