"""Position embeddings: fixed two-dimensional sine-cosine tables, and resampling to another grid of patches."""

import torch
from torch import Tensor


def sincos_position_embedding(embed_dim: int, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """A fixed table (1, prefix + rows * columns, embed_dim); prefix tokens get zeros.

    Half of the width encodes the row, half the column, each as sines then cosines of geometrically spaced
    frequencies 10000^(-i / (embed_dim / 4)) (arXiv:1706.03762 section 3.5, in two dimensions as in arXiv:2104.02057).
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = [coordinate.reshape(-1, 1).double() * frequencies for coordinate in (columns, rows)]  # (N, D/4) each
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)  # (N, D)
    prefix = torch.zeros(num_prefix_tokens, embed_dim, dtype=torch.float64)
    return torch.cat([prefix, table]).float().unsqueeze(0)


def resample_position_embedding(table: Tensor, grid: tuple[int, int], num_prefix_tokens: int, old_grid=None) -> Tensor:
    """A table (1, prefix + N, D) at another grid: bicubic with antialias over the patch part, prefix kept.

    `old_grid` is needed only where the old grid is not square.
    """
    from timm.layers import resample_abs_pos_embed

    old_size = list(old_grid) if old_grid is not None else None
    return resample_abs_pos_embed(table, list(grid), old_size=old_size, num_prefix_tokens=num_prefix_tokens)
