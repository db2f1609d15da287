"""Mixup and CutMix between neighbouring positions: 2k with 2k + 1, so that a pair is always on one rank.

Partners and weights derive from the pair's positions, so world size, accumulation and restarts change nothing. They are
drawn on the host for all pairs at once and travel in one copy; the device is never waited for.
"""

import numpy as np
import torch
from torch import Tensor

from models.objectives.batch import Batch
from pipeline.config.augmentation import AugmentationConfig
from pipeline.views.sample_generator import sample_generator


def mix_batch(batch: Batch, positions: np.ndarray, config: AugmentationConfig, seed: int) -> Batch:
    """The batch with each image blended (Mixup) or patched (CutMix) with its neighbour, in the images' own dtype.

    Shape:
        batch.images: (B, C, H, W) float, B even, positions 2k and 2k + 1 side by side
        positions: (B,) int64 on the host, equal to batch.positions
    """
    images = batch.images
    drawn = [_draw(int(first), images.shape[-2:], config, seed) for first in positions[::2]]
    plan = torch.tensor(drawn, dtype=torch.float32).repeat_interleave(2, dim=0)  # (B, 6)
    if images.is_cuda:
        plan = plan.pin_memory()
    plan = plan.to(images.device, non_blocking=True)
    mixed = torch.lerp(_partners(images), images, _share_of_first(plan, images))
    return batch._replace(images=mixed, mixed_labels=_partners(batch.labels), mix_weights=plan[:, 0])


def _partners(rows: Tensor) -> Tensor:
    """Each row's neighbour: rows 2k and 2k + 1 change places."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _share_of_first(plan: Tensor, images: Tensor) -> Tensor:
    """(B, 1, H, W): how much of a pixel is the image's own; Mixup's weight, or CutMix's nothing inside the box."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device).view(1, -1, 1)
    columns = torch.arange(width, device=images.device).view(1, 1, -1)
    pixel, top, left, bottom, right = plan[:, 1:].unsqueeze(-1).unsqueeze(-1).unbind(1)  # (B, 1, 1) each
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)  # (B, H, W)
    return torch.where(inside, 0.0, pixel).unsqueeze(1).to(images.dtype)


def _draw(position: int, size: tuple[int, int], config: AugmentationConfig, seed: int) -> tuple[float, ...]:
    """Of one pair: weight of the first label, share of the first image outside the box, and the box."""
    generator = sample_generator(seed, position, "mix")
    cut = config.cutmix_alpha > 0 and (config.mixup_alpha == 0 or generator.random() < 0.5)
    if not cut:
        weight = generator.beta(config.mixup_alpha, config.mixup_alpha)
        return weight, weight, 0, 0, 0, 0
    side = float(np.sqrt(1 - generator.beta(config.cutmix_alpha, config.cutmix_alpha)))
    centre = [int(generator.random() * length) for length in size]
    # The box has the area 1 - weight before it is clipped (arXiv:1905.04899, equation 2).
    top, left = (max(0, int(at - side * length / 2)) for at, length in zip(centre, size, strict=True))
    bottom, right = (min(length, int(at + side * length / 2)) for at, length in zip(centre, size, strict=True))
    return 1 - (bottom - top) * (right - left) / (size[0] * size[1]), 1, top, left, bottom, right
