"""Ten corruptions at five severities, of an evaluation input in place (arXiv:1903.12261, appendix B).

Severities are ImageNet-C's; lengths in pixels are for a side of 224 and scale with it. What is random comes from the
position of the image, the corruption and the severity: every model sees the same spoiled images.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from pipeline.shards.order import sample_seed

Floats = np.ndarray  # (H, W, C) float32 in 0..1
SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE_SIDE = 224.0


def corrupt(image: np.ndarray, position: int, corruption: str, severity: int) -> None:
    """Spoil an image.

    Shape:
        image: (H, W, C) uint8, or float32 in 0..1
    """
    generator = np.random.Generator(np.random.Philox(sample_seed(0, position, f"{corruption}:{severity}")))
    values = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
    values = values.clip(0, 1)  # a bicubic view of a float image overshoots
    spoiled = CORRUPTIONS[corruption](values, severity - 1, generator).clip(0, 1)
    image[...] = np.rint(spoiled * 255) if image.dtype == np.uint8 else spoiled


def _gaussian_noise(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[level]
    return image + generator.normal(0, deviation, image.shape)


def _shot_noise(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    photons = (60, 25, 12, 5, 3)[level]
    return generator.poisson(image * photons) / photons


def _impulse_noise(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    drawn = generator.random(image.shape)
    return np.where(drawn < share / 2, 0.0, np.where(drawn < share, 1.0, image))


def _defocus_blur(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    radius = max(0.6, (3, 4, 6, 8, 10)[level] * _scale(image))
    reach = math.ceil(radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1)  # its edge smoothed
    return _filtered(image, disk)


def _motion_blur(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    radius, deviation = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[level]
    reach = max(1, round(radius * _scale(image)))
    angle = generator.uniform(-math.pi / 4, math.pi / 4)
    side = 2 * reach + 1
    line = np.zeros((side, side))
    for distance in np.linspace(0, reach, 4 * reach + 1):  # behind the image alone: it moved there
        weight = math.exp(-0.5 * (distance / (deviation * _scale(image))) ** 2)
        line[round(reach + distance * math.sin(angle)), round(reach + distance * math.cos(angle))] += weight
    return _filtered(image, line)


def _zoom_blur(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    greatest, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.33, 0.03))[level]
    total, count = image.copy(), 1
    for zoom in np.arange(1 + step, greatest, step):
        total += _zoomed(image, zoom)
        count += 1
    return total / count


def _brightness(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    """The value of HSV raised: colours keep their hue and saturation."""
    value = image.max(axis=2, keepdims=True)
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[level], 1)
    return np.where(value > 0, image * raised / np.maximum(value, 1e-6), raised)


def _contrast(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[level] + mean


def _pixelate(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[level]
    height, width = image.shape[:2]
    small = (max(1, round(width * share)), max(1, round(height * share)))
    return _by_pillow(
        image, lambda one: one.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.NEAREST)
    )


def _jpeg(image: Floats, level: int, generator: np.random.Generator) -> Floats:
    def compressed(one: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        one.save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[level])
        return Image.open(buffer)

    return _by_pillow(image, compressed)


CORRUPTIONS: dict[str, Callable[[Floats, int, np.random.Generator], Floats]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}


def _scale(image: Floats) -> float:
    return min(image.shape[:2]) / REFERENCE_SIDE


def _filtered(image: Floats, kernel: np.ndarray) -> Floats:
    weights = (kernel / kernel.sum())[:, :, None]
    return ndimage.convolve(image, weights, mode="reflect")


def _zoomed(image: Floats, zoom: float) -> Floats:
    """The centre, enlarged to the whole image, bilinear."""
    height, width = image.shape[:2]
    centre = np.array([(height - 1) / 2, (width - 1) / 2, 0])
    matrix = np.array([1 / zoom, 1 / zoom, 1])
    return ndimage.affine_transform(image, matrix, centre - matrix * centre, order=1, mode="nearest")


def _by_pillow(image: Floats, change: Callable[[Image.Image], Image.Image]) -> Floats:
    """What works on eight bits, of three channels at once or of each alone."""
    bytes_ = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    if image.shape[2] == 3:
        return np.asarray(change(Image.fromarray(bytes_)), np.float32) / 255
    changed = [np.asarray(change(Image.fromarray(bytes_[:, :, channel]))) for channel in range(image.shape[2])]
    return np.stack(changed, axis=2).astype(np.float32) / 255
