"""Random erasing (arXiv:1708.04896) on the device: a rectangle of a normalised image becomes Gaussian noise.

Rectangles and noise are counter-based hashes of (seed, position): any rank and restart draws the same, and rectangles
are computed on the host, so that noise is made for erased images alone and the device is never waited for.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.objectives.batch import Batch
from models.randomness import position_uniform
from pipeline.config.augmentation import AugmentationConfig

_ATTEMPTS = 10  # a rectangle that does not fit is drawn anew, as timm and the paper's own code do
_ROWS = 16  # images whose noise is made at a time: 20 MB of hashes at 224 pixels


class _Rectangles(NamedTuple):
    """Of the erased images, on the host, each (E,) int64."""

    rows: Tensor  # in the batch
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def erase(batch: Batch, positions: np.ndarray, config: AugmentationConfig, seed: int) -> Batch:
    """The batch with noise of mean 0 and deviation 1 in a rectangle of some images; `batch.images` is written to.

    Shape:
        batch.images: (B, C, H, W) float, normalised
        positions: (B,) int64 on the host, equal to batch.positions
    """
    images, hosted = batch.images, torch.as_tensor(positions)
    rectangles = _rectangles(hosted, images.shape[-2:], config, seed)
    for start in range(0, len(rectangles.rows), _ROWS):
        part = torch.stack([field[start : start + _ROWS] for field in rectangles])  # (5, E)
        part = torch.cat([part, hosted[part[0]].unsqueeze(0)])
        part = (part.pin_memory() if images.is_cuda else part).to(images.device, non_blocking=True)
        noise = _noise(part[5], images.shape[1:], seed).to(images.dtype)
        images[part[0]] = torch.where(_inside(part, images.shape[-2:]), noise, images[part[0]])
    return batch


def _rectangles(positions: Tensor, size: tuple[int, int], config: AugmentationConfig, seed: int) -> _Rectangles:
    """The first of ten drawn rectangles that fits; an image that none fits stays as it is."""
    coin, draws = position_uniform(seed, "erase", positions, 1 + 4 * _ATTEMPTS).double().split([1, 4 * _ATTEMPTS], 1)
    area, ratio, top, left = draws.unflatten(1, (_ATTEMPTS, 4)).unbind(2)  # (B, attempts) each
    (least, most), (narrow, wide) = config.erase_area, config.erase_ratio
    pixels = size[0] * size[1] * (least + (most - least) * area)
    ratio = torch.exp(math.log(narrow) + math.log(wide / narrow) * ratio)
    height, width = (pixels * ratio).sqrt().round().long(), (pixels / ratio).sqrt().round().long()
    fits = (height < size[0]) & (width < size[1])
    rows = ((coin[:, 0] < config.erase_probability) & fits.any(dim=1)).nonzero()[:, 0]
    first = fits.int().argmax(dim=1)[rows]  # the first of equals
    height, width, top, left = (field[rows, first] for field in (height, width, top, left))
    top, left = (top * (size[0] - height + 1)).long(), (left * (size[1] - width + 1)).long()
    return _Rectangles(rows, top, left, height, width)


def _inside(part: Tensor, size: tuple[int, int]) -> Tensor:
    """(E, 1, H, W) bool: True within each rectangle."""
    _, top, left, height, width, _ = (field.view(-1, 1, 1, 1) for field in part)
    rows = torch.arange(size[0], device=part.device).view(1, 1, -1, 1)
    columns = torch.arange(size[1], device=part.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)


def _noise(positions: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """(E, *shape) float32, standard normal, by Box and Muller's transform of two uniform numbers into two."""
    count = math.prod(shape)
    half = -(-count // 2)
    first, second = position_uniform(seed, "erase noise", positions, 2 * half).split(half, dim=1)
    radius, angle = (-2 * torch.log1p(-first)).sqrt(), 2 * math.pi * second  # 1 - [0, 1) is never zero
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
    return normal.reshape(-1, *shape)
