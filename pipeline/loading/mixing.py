"""Mixup and CutMix between neighbouring positions: 2k with 2k + 1, so that a pair is always on one rank.

Partners and weights derive from the pair's positions, so world size, accumulation and restarts change nothing.
"""

import numpy as np
import torch
from torch import Tensor

from models.objectives.batch import Batch
from pipeline.config.training import AugmentationConfig
from pipeline.shards.order import sample_seed


def mix_batch(batch: Batch, config: AugmentationConfig, seed: int) -> Batch:
    """The batch with each image blended (Mixup) or patched (CutMix) with its neighbour.

    Shape:
        batch.images: (B, C, H, W) float, B even, positions 2k and 2k + 1 side by side
    """
    images = batch.images
    partner = torch.arange(len(images), device=images.device) ^ 1
    other = images[partner]
    mixed, weights = torch.empty_like(images), torch.empty(len(images), device=images.device)
    for pair in range(len(images) // 2):
        generator = np.random.Generator(np.random.Philox(sample_seed(seed, int(batch.positions[2 * pair]), "mix")))
        rows = slice(2 * pair, 2 * pair + 2)
        cut = config.cutmix_alpha > 0 and (config.mixup_alpha == 0 or generator.random() < 0.5)
        mix = _cutmix if cut else _mixup
        mixed[rows], weights[rows] = mix(images[rows], other[rows], config, generator)
    return batch._replace(images=mixed, mixed_labels=batch.labels[partner], mix_weights=weights)


def _mixup(images: Tensor, other: Tensor, config: AugmentationConfig, generator) -> tuple[Tensor, float]:
    weight = float(generator.beta(config.mixup_alpha, config.mixup_alpha))
    return weight * images + (1 - weight) * other, weight


def _cutmix(images: Tensor, other: Tensor, config: AugmentationConfig, generator) -> tuple[Tensor, float]:
    """A box of the partner, its area 1 - weight before clipping (arXiv:1905.04899, equation 2)."""
    height, width = images.shape[-2:]
    side = float(np.sqrt(1 - generator.beta(config.cutmix_alpha, config.cutmix_alpha)))
    centre_y, centre_x = generator.integers(height), generator.integers(width)
    top, bottom = (int(np.clip(centre_y + sign * side * height / 2, 0, height)) for sign in (-1, 1))
    left, right = (int(np.clip(centre_x + sign * side * width / 2, 0, width)) for sign in (-1, 1))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
