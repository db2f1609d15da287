"""Means of an image's pixels and of their squares, from which the statistics of a dataset are made."""

import numpy as np
from PIL import Image

from pipeline.shards.decoding import ImageFault

BLOCK_VALUES = 1 << 24  # at once, as float64


def pixel_moments(pixels: Image.Image | np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, mean square) per channel, of values 0..1 (float arrays: as they are)."""
    if isinstance(pixels, Image.Image) and pixels.mode == "RGB":
        return _moments_of_histogram(np.array(pixels.histogram(), dtype=np.int64).reshape(3, 256))
    if isinstance(pixels, Image.Image) and pixels.mode == "P":
        return pixel_moments(pixels.convert("RGB"))  # the colours, not their numbers in the palette
    values = np.asarray(pixels)
    scale = 1.0 if values.dtype.kind in "fb" else float(np.iinfo(values.dtype).max if values.itemsize < 4 else 65535)
    values = values.reshape(values.shape[0] * values.shape[1], -1)
    with np.errstate(invalid="ignore", over="ignore"):  # the next lines see what comes of it
        mean, mean_square = _moments_of_values(values, scale)
    if not np.isfinite(mean_square).all():
        raise ImageFault("broken_image", "holds values that are not finite")
    return tuple(mean.tolist()), tuple(mean_square.tolist())


def _moments_of_values(values: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Of (N, C), in blocks where all at once would be large."""
    rows = max(1, BLOCK_VALUES // values.shape[1])
    if len(values) <= rows:
        scaled = values.astype(np.float64) / scale
        return scaled.mean(axis=0), (scaled**2).mean(axis=0)
    total, total_square = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for start in range(0, len(values), rows):
        scaled = values[start : start + rows].astype(np.float64) / scale
        total += scaled.sum(axis=0)
        total_square += (scaled**2).sum(axis=0)
    return total / len(values), total_square / len(values)


def _moments_of_histogram(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    levels = np.arange(256)
    total = int(counts[0].sum())
    mean = (counts @ levels) / (total * 255)
    mean_square = (counts @ levels**2) / (total * 255**2)
    return tuple(mean.tolist()), tuple(mean_square.tolist())
