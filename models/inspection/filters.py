"""What the patch embedding looks for: principal components of its filters (arXiv:2010.11929, figure 7 left)."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.layers import PatchEmbed
from torch import Tensor, nn

from models.inspection.display import NothingToDraw
from models.inspection.panels import Panel, panel_sheet

SHOWN = 28  # the paper shows as many
MOST_CHANNELS = 12  # of which a filter is drawn side by side


class FilterComponents(NamedTuple):
    filters: Tensor  # (K, C, P, P) float32, each of length 1, the most telling first
    shares: Tensor  # (K,) of the variance among the filters, that each explains


def patch_filters(encoder: nn.Module) -> Tensor:
    """(D, C, P, P) float32: what each channel of a patch token is correlated with. Raises NothingToDraw."""
    embedding = getattr(encoder, "patch_embed", None)
    if not isinstance(embedding, PatchEmbed):
        raise NothingToDraw(f"{type(encoder).__name__} does not embed its patches by one linear projection")
    return embedding.proj.weight.detach().float().cpu()


def filter_components(encoder: nn.Module, count: int = SHOWN) -> FilterComponents:
    """The first principal components of the filters; their signs, which mean nothing, make the largest weight > 0."""
    filters = patch_filters(encoder)
    flat = filters.flatten(1).double()
    _, singular, rows = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    rows = rows[:count]
    rows = rows * rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    variance = singular.square()
    shares = variance / variance.sum().clamp_min(torch.finfo(variance.dtype).tiny)
    return FilterComponents(rows.reshape(-1, *filters.shape[1:]).float(), shares[:count].float())


def filters_picture(encoder: nn.Module) -> Image.Image:
    """RGB filters in their colours; of other numbers of channels each channel's part in grey, side by side."""
    filters, shares = filter_components(encoder)
    _, channels, height, width = filters.shape
    panels = [Panel(_tile(one), f"{share:.1%}") for one, share in zip(filters, shares.tolist(), strict=True)]
    beside = 7 if channels in (1, 3) else 2
    rows = [panels[start : start + beside] for start in range(0, len(panels), beside)]
    of = "" if channels in (1, 3) else f", {min(channels, MOST_CHANNELS)} of {channels} channels side by side"
    note = (
        f"Principal components of {len(patch_filters(encoder))} filters of {height} × {width} pixels{of}; percentages: "
        "share of the variance. Each is scaled by its own largest weight: grey is 0, its sign means nothing."
    )
    pixels = 88 if channels in (1, 3) else 88 * min(channels, MOST_CHANNELS)
    return panel_sheet(rows, title="Patch-embedding filters", note=note, panel_pixels=min(pixels, 520))


def _tile(component: Tensor) -> np.ndarray:
    """(h, w, 3) in 0..1, symmetric around grey."""
    scaled = 0.5 + 0.5 * component / component.abs().max().clamp_min(1e-12)
    if len(scaled) == 3:
        return scaled.permute(1, 2, 0).numpy()
    with_gaps = nn.functional.pad(scaled[:MOST_CHANNELS], (0, 1), value=1.0)  # a white line behind each channel
    return torch.cat(list(with_gaps), dim=1)[:, :-1].unsqueeze(2).expand(-1, -1, 3).numpy()
