"""What the position embedding says of where a patch is (arXiv:2010.11929, figure 7 centre)."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.inspection.display import NothingToDraw
from models.inspection.panels import Panel, Scale, panel_sheet

MOST_PANELS = 14  # per side: of a finer grid every second, third, ... patch is shown
LONGER_SIDE = 760  # pixels, about


def position_similarity(encoder: nn.Module) -> Tensor:
    """Cosine of each patch's position embedding with those of all: (rows, columns, rows, columns) float32, -1..1.

    NothingToDraw where no table of positions is added to the patches: there is none, or they are relative or rotary.
    """
    table = getattr(encoder, "pos_embed", None)
    if not isinstance(table, Tensor):
        raise NothingToDraw(f"this {type(encoder).__name__} adds no position embedding to its patches")
    rows, columns = encoder.patch_embed.grid_size
    patches = table.detach().float().cpu().reshape(-1, table.shape[-1])[-rows * columns :]  # prefix tokens come first
    directions = nn.functional.normalize(patches, dim=1)
    return (directions @ directions.T).clamp(-1, 1).reshape(rows, columns, rows, columns)


def positions_picture(encoder: nn.Module) -> Image.Image:
    """One map per patch, where the patch lies: its similarity with every patch of the grid."""
    similarity = position_similarity(encoder)
    rows, columns = similarity.shape[:2]
    step = -(-max(rows, columns) // MOST_PANELS)
    mosaic = _mosaic(similarity[step // 2 :: step, step // 2 :: step])
    every = "" if step == 1 else f" Of {step} × {step} patches one has a map."
    note = (
        f"Each map belongs to the patch at its place in the {rows} × {columns} grid and shows how similar the position "
        f"embeddings of all patches are to its own.{every}"
    )
    lowest = min(0.9, math.floor(10 * similarity.min().item()) / 10)  # fixed tables use a part of -1..1 alone
    scale = Scale("cosine similarity", lowest, 1)
    enlarged = max(1, LONGER_SIDE // max(mosaic.shape)) * max(mosaic.shape)  # every cell alike
    return panel_sheet([[Panel(mosaic)]], title="Position embedding", note=note, scale=scale, panel_pixels=enlarged)


def _mosaic(maps: Tensor) -> np.ndarray:
    """(h, w): the maps at their places, white lines between them."""
    down, across, rows, columns = maps.shape
    gap = max(1, round(max(rows, columns) / 10))
    canvas = torch.full((down, across, rows + gap, columns + gap), torch.nan)
    canvas[:, :, :rows, :columns] = maps
    joined = canvas.permute(0, 2, 1, 3).reshape(down * (rows + gap), across * (columns + gap))
    return joined[:-gap, :-gap].numpy()
