"""Which patches are hidden from the encoder: as many in every image, from (seed, position)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.masked.counts import patches_of_share
from models.randomness import position_bits, position_uniform

ROUNDS = 10  # rectangles drawn


class PatchMask(NamedTuple):
    visible: Tensor  # (B, K) int64, ascending: the patches the encoder sees
    masked: Tensor  # (B, N) bool: True where the patch is hidden from the encoder


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay visible: N - floor(N * mask_ratio), at least 1."""
    return max(1, num_patches - patches_of_share(num_patches, mask_ratio))


def random_patch_mask(positions: Tensor, num_patches: int, mask_ratio: float, seed: int) -> PatchMask:
    """Hide the same number of patches in every image, chosen uniformly (MAE, section 3) from (seed, position).

    Shape:
        positions: (B,) int64, the samples' positions in the run
    """
    noise = position_bits(seed, "mask", positions, num_patches)  # 64 bits: no ties to speak of
    visible = noise.argsort(dim=1)[:, : num_visible_patches(num_patches, mask_ratio)].sort(dim=1).values  # (B, K)
    masked = torch.ones(len(positions), num_patches, dtype=torch.bool, device=positions.device)  # (B, N)
    return PatchMask(visible, masked.scatter(1, visible, False))


def block_patch_mask(positions: Tensor, grid: tuple[int, int], mask_ratio: float, seed: int) -> PatchMask:
    """Hide as many patches as `random_patch_mask` does, in rectangles (BEiT, arXiv:2106.08254, algorithm 1).

    BEiT draws rectangles until enough is hidden; here they are always ROUNDS, and single patches fill up what is
    missing, so that every image hides as many. A rectangle that would hide too many is cut short.

    Shape:
        positions: (B,) int64, the samples' positions in the run
        grid: (rows, columns) of patches
    """
    rows, columns = grid
    patches = rows * columns
    hidden = patches - num_visible_patches(patches, mask_ratio)
    least = max(1, patches * 16 // 196)  # BEiT's 16 of 14 x 14
    draws = position_uniform(seed, "blocks", positions, 4 * ROUNDS).view(len(positions), ROUNDS, 4, 1)
    place = torch.arange(patches, device=positions.device)
    row, column = place // columns, place % columns
    first = torch.full((len(positions), patches), ROUNDS, device=positions.device)  # the first rectangle on each patch
    for number in range(ROUNDS):
        size, ratio, top, left = draws[:, number].unbind(1)  # (B, 1) each
        missing = (hidden - (first < ROUNDS).sum(dim=1, keepdim=True)).clamp_min(least)
        area, ratio = least + size * (missing - least), 0.3 + ratio * (1 / 0.3 - 0.3)
        height = (area * ratio).sqrt().round().clamp(1, rows)
        width = (area / ratio).sqrt().round().clamp(1, columns)
        top, left = (top * (rows - height + 1)).floor(), (left * (columns - width + 1)).floor()
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)  # (B, N)
        first = torch.where(inside & (first == ROUNDS), number, first)
    lot = position_bits(seed, "mask", positions, patches).argsort(dim=1).argsort(dim=1)  # of those on no rectangle
    within = torch.where(first < ROUNDS, place, lot)
    visible = (first * patches + within).argsort(dim=1)[:, hidden:].sort(dim=1).values
    masked = torch.ones(len(positions), patches, dtype=torch.bool, device=positions.device)
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


def inverse_block_mask(positions: Tensor, grid: tuple[int, int], mask_ratio: float, seed: int) -> PatchMask:
    """Leave one rectangle visible and hide the rest: CAPI's "inverse block with roll" (arXiv:2502.08769, section 3).

    The rectangle's height over its width is log-uniform in [1/2, 2], as far as the grid has room for it. Its place is
    uniform on the grid, across whose borders it goes on at the other side, so every patch is hidden equally often. Its
    last row may be shorter than the others, so that it has as many patches in every image.

    Shape:
        positions: (B,) int64, the samples' positions in the run
    """
    rows, columns = grid
    visible = num_visible_patches(rows * columns, mask_ratio)
    most = min(math.log(2.0), math.log(rows**2 / visible))
    least = min(max(-math.log(2.0), math.log(visible / columns**2)), most)
    draws = position_uniform(seed, "mask", positions, 3).double()
    ratio = (least + draws[:, :1] * (most - least)).exp()  # (B, 1)
    width = (visible / ratio).sqrt().ceil().clamp(max=columns).long()
    top, left = (draws[:, 1:2] * rows).long(), (draws[:, 2:] * columns).long()
    place = torch.arange(visible, device=positions.device)  # within the rectangle, row by row
    row, column = (top + place // width) % rows, (left + place % width) % columns  # (B, K)
    shown = (row * columns + column).sort(dim=1).values
    masked = torch.ones(len(positions), rows * columns, dtype=torch.bool, device=positions.device)
    return PatchMask(shown, masked.scatter(1, shown, False))


def choose_masked(mask: PatchMask, count: int, positions: Tensor, seed: int) -> Tensor:
    """(B, count) int64, ascending: some of each image's hidden patches, chosen uniformly from (seed, position)."""
    noise = position_bits(seed, "predicted", positions, mask.masked.shape[1]) >> 1  # below the largest number
    noise = noise.masked_fill(~mask.masked, torch.iinfo(torch.int64).max)
    return noise.argsort(dim=1)[:, :count].sort(dim=1).values
