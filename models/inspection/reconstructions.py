"""A picture of what an objective with hidden patches fills in: image, what was seen, reconstruction, side by side."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


@torch.no_grad()
def reconstruction_sheet(
    objective: nn.Module,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    cell_pixels: int = 128,
) -> Image.Image:
    """One row per image: the image, its visible patches, the reconstruction; of an objective that has `reconstruct`.

    Shape:
        images: (B, C, H, W) float, normalised by `mean` and `std`
    """
    training = objective.training
    objective.eval()
    filled, seen = objective.reconstruct(images, torch.arange(len(images), device=images.device))
    objective.train(training)
    rows = [
        np.concatenate([_cell(picture[i], mean, std, cell_pixels) for picture in (images, seen, filled)], axis=1)
        for i in range(len(images))
    ]
    return Image.fromarray(np.concatenate(rows, axis=0))


def _cell(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...], pixels: int) -> np.ndarray:
    """(pixels, pixels, 3) uint8 with a thin white border; small images are enlarged without smoothing."""
    channels = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    array = (image.float().cpu() * channels[1] + channels[0]).clamp(0, 1).permute(1, 2, 0).numpy()
    if array.shape[2] != 3:
        array = np.repeat(array[:, :, :1], 3, axis=2)
    picture = Image.fromarray((array * 255).astype(np.uint8))
    enlarge = Image.Resampling.NEAREST if picture.width < pixels else Image.Resampling.BICUBIC
    picture = picture.resize((pixels - 4, pixels - 4), enlarge)
    return np.pad(np.asarray(picture), ((2, 2), (2, 2), (0, 0)), constant_values=255)
