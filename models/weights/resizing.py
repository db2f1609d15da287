"""How a tensor of another size fits an encoder: positions at another grid, a patch embedding of other channels.

Every rule has a sentence, which the report of a loading repeats.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from torch import Tensor, nn

from models.encoders.positions import resample_position_embedding

Grid = tuple[int, int]


def resized(
    name: str, found: Tensor, target: Tensor, encoder: nn.Module, old_grid: Grid | None
) -> tuple[Tensor, str | None]:
    """The tensor as the encoder needs it, and the rule that changed it; None where it fits, or where none applies."""
    patch_embed = getattr(encoder, "patch_embed", None)
    grid = getattr(patch_embed, "grid_size", None)
    same = found.shape == target.shape
    if name == "patch_embed.proj.weight" and found.ndim == 4 and not same:
        return _with_channels(found, target)
    if name == "pos_embed" and grid is not None and not (same and old_grid in (None, grid)):
        if found.shape[-1] == target.shape[-1]:
            return _positions(found, grid, encoder.num_prefix_tokens, old_grid)
    if name.startswith("parametrizations.pos_embed") and not same and found.shape[-1] == target.shape[-1]:
        length = (target.shape[1], 1)
        axis = F.interpolate(found.transpose(1, 2).unsqueeze(-1), size=length, mode="bicubic", antialias=True)
        return axis.squeeze(-1).transpose(1, 2), f"an axis of {found.shape[1]} resampled to {target.shape[1]}"
    if name.endswith("relative_position_bias_table") and found.shape[-1] == target.shape[-1]:
        if not same or (old_grid is not None and old_grid != grid):
            window = encoder.get_submodule(name.rpartition(".")[0]).window_size
            return _relative_positions(name, found, target, window, old_grid)
    return found, None


def _with_channels(found: Tensor, target: Tensor) -> tuple[Tensor, str | None]:
    """From three channels to others, by timm's rule; any other change has no rule."""
    theirs, ours = found.shape[1], target.shape[1]
    if theirs != 3 or ours == 3 or found.shape[2:] != target.shape[2:]:
        return found, None
    if ours == 1:
        return adapt_input_conv(1, found), "kernels of 3 channels summed to 1 (timm's adapt_input_conv)"
    rule = f"kernels of 3 channels repeated in their order to {ours}, times 3/{ours} (timm's adapt_input_conv)"
    return adapt_input_conv(ours, found), rule


def _positions(found: Tensor, grid: Grid, prefix: int, old_grid: Grid | None) -> tuple[Tensor, str]:
    """A table (1, prefix + N, D) at the encoder's grid; prefix tokens beyond those of the source get zeros."""
    rows = found.shape[1]
    old_prefix = rows - math.prod(old_grid) if old_grid else _prefix_of_a_square(rows, prefix)
    if old_prefix is None or old_prefix < 0:
        raise ValueError(f"pos_embed: {rows} positions are no square of patches behind 0 or 1 tokens")
    kept = found[:, : min(prefix, old_prefix)]
    zeros = found.new_zeros(1, prefix - kept.shape[1], found.shape[2])
    table = torch.cat([kept, zeros, found[:, old_prefix:]], dim=1)
    side = math.isqrt(rows - old_prefix)
    old = old_grid or (side, side)
    said = "positions" if old_prefix == prefix else f"positions behind {prefix} tokens, not {old_prefix}"
    rule = f"{said} of a grid of {old[0]} x {old[1]} resampled to {grid[0]} x {grid[1]} (bicubic, antialias)"
    return resample_position_embedding(table, grid, prefix, old), rule


def _prefix_of_a_square(rows: int, prefix: int) -> int | None:
    return next(
        (count for count in (prefix, 1, 0) if rows > count and math.isqrt(rows - count) ** 2 == rows - count), None
    )


def _relative_positions(
    name: str, found: Tensor, target: Tensor, window: Grid, old_window: Grid | None
) -> tuple[Tensor, str]:  # fmt: skip
    """A table (offsets + 3 or 0, heads) for another window of patches; the three are the class token's.

    Without `old_window` it was a square.
    """
    ours = len(target) - _offsets(window)
    if old_window is None:
        side = next((side for extra in (ours, 3, 0) if (side := _side_of_offsets(len(found) - extra))), 0)
        old_window = (side, side)
    theirs = len(found) - _offsets(old_window)
    if theirs not in (0, 3):
        raise ValueError(f"{name}: {len(found)} relative positions are those of no square window of patches")
    kept, of_token = found[: len(found) - theirs], found[len(found) - theirs :]
    table = resize_rel_pos_bias_table(kept, window, (_offsets(window), found.shape[1]), old_window_size=old_window)
    rule = "relative positions interpolated (timm's resize_rel_pos_bias_table)"
    if ours and not theirs:
        of_token = found.new_zeros(ours, found.shape[1])
        rule += ", those of the class token zero"
    return torch.cat([table, of_token[:ours]]), rule


def _offsets(window: Grid) -> int:
    """Relative positions between the patches of a window."""
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _side_of_offsets(count: int) -> int | None:
    """The side of the square window that has so many; None where none has."""
    root = math.isqrt(max(count, 0))
    return (root + 1) // 2 if root * root == count and root % 2 else None
