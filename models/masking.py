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


def square_mask(positions: Tensor, grid: tuple[int, int], side: int, num_hidden: int, seed: int) -> Tensor:
    """Hide `num_hidden` squares of side x side patches in every image, chosen uniformly from (seed, position).

    Shape:
        positions: (B,) int64, the samples' positions in the run
        grid: (rows, columns) of patches, both multiples of `side`
        returns: (B, N) bool, True where the patch is hidden from the encoder
    """
    rows, columns = grid[0] // side, grid[1] // side
    order = position_bits(seed, "mask", positions, rows * columns).argsort(dim=1)
    hidden = torch.zeros(len(positions), rows * columns, dtype=torch.bool, device=positions.device)
    squares = hidden.scatter(1, order[:, :num_hidden], True).view(-1, rows, columns)
    return squares.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2).flatten(1)
