"""What a masked autoencoder fills in: the image, what the encoder saw of it, and the result, side by side.

Patches are hidden as in training, or where a person says. In the first case a hidden patch gets its true brightness
and contrast back where training had normalised them away, as MAE's figures do; in the second nothing of what is
covered may be used, so both are interpolated from the patches around. Drawn by Pillow, which costs the end of a
training nothing to speak of.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from models.encoders.patches import patchify, unpatchify
from models.inspection.display import NothingToDraw, display_pixels
from models.masked.masking import PatchMask
from models.objectives.mae import MaskedAutoencoder

HEADINGS = ("image", "what the encoder saw", "filled in")
HEADING_PIXELS = 20


@torch.no_grad()
def reconstruction_sheet(
    objective: nn.Module,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    cell_pixels: int = 144,
) -> Image.Image:
    """One row per image: the image, its visible patches, the reconstruction, patches hidden as in training.

    Of any objective that has `reconstruct`.

    Shape:
        images: (B, C, H, W) float, normalised by `mean` and `std`
    """
    training = objective.training
    objective.eval()
    filled, seen = objective.reconstruct(images, torch.arange(len(images), device=images.device))
    objective.train(training)
    return image_table([images, seen, filled], mean, std, cell_pixels=cell_pixels)


@torch.no_grad()
def fill_in(objective: MaskedAutoencoder, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Images with the patches of `masked` filled in, and the images as the encoder saw them; as `reconstruct` gives.

    Covered pixels do not matter. NothingToDraw where all patches are hidden, or none.

    Shape:
        images: (B, C, H, W) float, normalised
        masked: (N,) bool, True where the patch is hidden
        returns: two of (B, C, H, W)
    """
    visible = (~masked).nonzero().flatten()
    if len(visible) in (0, len(masked)):
        hidden = len(masked) - len(visible)
        raise NothingToDraw(f"{hidden} of {len(masked)} patches are hidden: some must be, and some must not")
    size, grid, hidden = objective.patch_size, objective.grid, masked.unsqueeze(-1)
    seen = patchify(images.float(), size).masked_fill(hidden, 0.0)
    mask = PatchMask(visible.expand(len(images), -1), masked.expand(len(images), -1))
    predicted = objective.predict(unpatchify(seen, size, grid).to(images.dtype), mask).float()
    if objective.config.normalise_target:
        variance, mean = torch.var_mean(seen[:, visible], dim=2, keepdim=True)  # (B, K, 1)
        nearness = _nearness(grid, visible).to(seen)
        predicted = predicted * (nearness @ (variance + 1e-6).sqrt()) + nearness @ mean
    filled = torch.where(hidden, predicted, seen)
    return unpatchify(filled, size, grid), unpatchify(seen, size, grid)


def _nearness(grid: tuple[int, int], visible: Tensor) -> Tensor:
    """(N, K): how much each visible patch counts for each patch, by inverse squared distance; rows sum to 1."""
    y, x = torch.meshgrid(*(torch.arange(side, device=visible.device) for side in grid), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    weights = 1 / torch.cdist(places, places[visible]).square().clamp_min(1e-6)
    return weights / weights.sum(dim=1, keepdim=True)


def patches_touched(covered: Tensor, patch_size: int) -> Tensor:
    """(N,) bool: patches with at least one covered pixel.

    Shape:
        covered: (H, W) bool
    """
    return patchify(covered.float()[None, None], patch_size)[0].any(dim=1)


def image_table(
    columns: list[Tensor], mean: tuple[float, ...], std: tuple[float, ...], *, cell_pixels: int = 144
) -> Image.Image:
    """Image, seen and filled in, a row for each; their longer side is `cell_pixels`.

    Shape:
        columns: three of (B, C, H, W) float, normalised by `mean` and `std`
    """
    shown = [[display_pixels(image, mean, std) for image in images] for images in columns]
    rows = [np.concatenate([_cell(pixels, cell_pixels) for pixels in row], axis=1) for row in zip(*shown, strict=True)]
    sheet = np.concatenate([np.full((HEADING_PIXELS, rows[0].shape[1], 3), 255, np.uint8), *rows])
    picture = Image.fromarray(sheet)
    pen, width = ImageDraw.Draw(picture), rows[0].shape[1] // 3
    for column, heading in enumerate(HEADINGS):
        place = (column * width + width / 2, HEADING_PIXELS / 2)
        pen.text(place, heading, fill="black", anchor="mm", font=ImageFont.load_default(size=12))
    return picture


def _cell(pixels: np.ndarray, longer_side: int) -> np.ndarray:
    """uint8 with a thin white border; small images are enlarged without smoothing."""
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    ratio = (longer_side - 4) / max(picture.size)
    enlarge = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.BICUBIC
    picture = picture.resize([round(ratio * side) for side in picture.size], enlarge)
    return np.pad(np.asarray(picture), ((2, 2), (2, 2), (0, 0)), constant_values=255)
