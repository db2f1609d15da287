"""Position embeddings: fixed sine-cosine tables, learned axes, and resampling to another grid of patches."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


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


def resample_position_embedding(
    table: Tensor, grid: tuple[int, int], num_prefix_tokens: int, old_grid=None, *, antialias: bool = True
) -> Tensor:
    """A table (1, prefix + N, D) at another grid: bicubic over the patch part, prefix kept.

    `old_grid` is needed only where the old grid is not square. Without `antialias` it is what Hugging Face's
    `interpolate_pos_encoding` does: torch's bicubic kernel is then another one, also where the grid grows.
    """
    from timm.layers import resample_abs_pos_embed

    old_size = list(old_grid) if old_grid is not None else None
    return resample_abs_pos_embed(
        table, list(grid), old_size=old_size, num_prefix_tokens=num_prefix_tokens, antialias=antialias
    )


def sinusoidal_position_embedding(embed_dim: int, num_patches: int, num_prefix_tokens: int) -> Tensor:
    """A fixed table (1, prefix + N, embed_dim) over the patches in row-major order; prefix tokens get zeros.

    Sines then cosines of geometrically spaced frequencies 10000^(-i / (embed_dim / 2)) (arXiv:1706.03762, section 3.5,
    whose pairs stand side by side: the same table with its columns in another order).
    """
    half = embed_dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(num_patches, dtype=torch.float64).unsqueeze(1) * frequencies  # (N, D/2)
    prefix = torch.zeros(num_prefix_tokens, embed_dim, dtype=torch.float64)
    return torch.cat([prefix, torch.cat([angles.sin(), angles.cos()], dim=1)]).float().unsqueeze(0)


class LearnedAxes(nn.Module):
    """A table (1, prefix + rows * columns, D) from a vector per row and per column, side by side (ViT, appendix D.4).

    Prefix tokens get zeros.

    Shape:
        rows: (1, rows, D/2)
        columns: (1, columns, D/2)
    """

    def __init__(self, grid: tuple[int, int], num_prefix_tokens: int):
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:
        shape = (1, rows.shape[1], columns.shape[1], -1)
        table = torch.cat([rows.unsqueeze(2).expand(shape), columns.unsqueeze(1).expand(shape)], dim=-1)
        table = table.flatten(1, 2)  # (1, N, D)
        return torch.cat([table.new_zeros(1, self.num_prefix_tokens, table.shape[-1]), table], dim=1)

    def right_inverse(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh axes for a new encoder: of `table` only the width is read."""
        axes = [torch.empty(1, count, table.shape[-1] // 2) for count in self.grid]
        return tuple(nn.init.trunc_normal_(axis, std=0.02) for axis in axes)


def learned_axes(encoder: nn.Module, grid: tuple[int, int], num_prefix_tokens: int) -> None:
    """Let `encoder.pos_embed` be made of two learned axes; `write_out_axes` makes it a plain table again."""
    parametrize.register_parametrization(encoder, "pos_embed", LearnedAxes(grid, num_prefix_tokens))


def write_out_axes(encoder: nn.Module) -> None:
    """In place: the table that two learned axes make becomes a learned table of its own, as timm has it."""
    if parametrize.is_parametrized(encoder, "pos_embed"):
        parametrize.remove_parametrizations(encoder, "pos_embed", leave_parametrized=True)
