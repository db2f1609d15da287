"""Which patches are hidden from the encoder."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.randomness import position_bits


class PatchMask(NamedTuple):
    visible: Tensor  # (B, K) int64, ascending: the patches the encoder sees
    masked: Tensor  # (B, N) bool: True where the patch is hidden from the encoder


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay visible: N - floor(N * mask_ratio), at least 1."""
    return max(1, num_patches - int(num_patches * mask_ratio))


def random_patch_mask(positions: Tensor, num_patches: int, mask_ratio: float, seed: int) -> PatchMask:
    """Hide the same number of patches in every image, chosen uniformly (MAE, section 3) from (seed, position).

    Shape:
        positions: (B,) int64, the samples' positions in the run
    """
    noise = position_bits(seed, "mask", positions, num_patches)  # 64 bits: no ties to speak of
    visible = noise.argsort(dim=1)[:, : num_visible_patches(num_patches, mask_ratio)].sort(dim=1).values  # (B, K)
    masked = torch.ones(len(positions), num_patches, dtype=torch.bool, device=positions.device)  # (B, N)
    return PatchMask(visible, masked.scatter(1, visible, False))
