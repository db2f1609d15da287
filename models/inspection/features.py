"""What the encoder tells apart: its patch features by their first three principal components, as colours."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.inspection.display import NothingToDraw
from models.inspection.panels import Panel, Scale, panel_sheet

CUT = 0.01  # of the patches lie beyond either end of a component's scale


class FeatureComponents(NamedTuple):
    values: Tensor  # (B, rows, columns, 3) float32, each component stretched to 0..1 over all images together
    shares: Tensor  # (3,) of the features' variance, that each explains


@torch.no_grad()
def patch_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """(B, rows, columns, D): the patches' tokens after the last norm, also where timm keeps it behind the pooling.

    Shape:
        images: (B, C, H, W) float, normalised
    """
    if not all(hasattr(encoder, name) for name in ("fc_norm", "num_prefix_tokens", "patch_embed")):
        raise NothingToDraw(f"{type(encoder).__name__} has no tokens of patches")
    tokens = encoder.fc_norm(encoder.forward_features(images))
    return tokens[:, encoder.num_prefix_tokens :].unflatten(1, encoder.patch_embed.grid_size)


def feature_components(features: Tensor) -> FeatureComponents:
    """The first three principal components over the patches of all images.

    A component's sign, which means nothing, makes its largest weight positive; what is missing (fewer than three
    components) is 0.5 everywhere.

    Shape:
        features: (B, rows, columns, D)
    """
    flat = features.double().cpu().flatten(0, 2)
    flat = flat - flat.mean(dim=0)
    variances, directions = torch.linalg.eigh(flat.T @ flat)
    variances, directions = variances.flip(0)[:3].clamp_min(0), directions.flip(1)[:, :3]
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    values = torch.stack([_stretched(column) for column in (flat @ directions).T], dim=1)
    values = nn.functional.pad(values, (0, 3 - values.shape[1]), value=0.5)
    shares = nn.functional.pad(variances, (0, 3 - len(variances))) / flat.square().sum().clamp_min(1e-12)
    return FeatureComponents(values.unflatten(0, features.shape[:3]).float(), shares.float())


def _stretched(values: Tensor) -> Tensor:
    low, high = np.quantile(values.numpy(), (CUT, 1 - CUT))
    if high - low < 1e-9:
        return torch.full_like(values, 0.5)
    return ((values - low) / (high - low)).clamp(0, 1)


def features_picture(components: FeatureComponents, shown: Sequence[np.ndarray], names: Sequence[str]) -> Image.Image:
    """A row per image: the image, the three components as red, green and blue, and the first alone.

    Shape:
        shown: per image (H, W, 3) in 0..1
    """
    headings = ("image", "components 1, 2, 3", "component 1")
    rows = [
        [
            Panel(pixels, "" if number else heading)
            for pixels, heading in zip((image, colours.numpy(), colours[:, :, 0].numpy()), headings, strict=True)
        ]
        for number, (image, colours) in enumerate(zip(shown, components.values, strict=True))
    ]
    shares = ", ".join(f"{share:.0%}" for share in components.shares.tolist())
    note = (
        "Patches that the encoder holds for alike have alike colours, in all images. Principal components of the patch "
        f"features as red, green and blue; share of the variance: {shares}."
    )
    scale = Scale("component 1, stretched", 0, 1)
    return panel_sheet(rows, title="Patch features", note=note, row_names=names, scale=scale, panel_pixels=144)
