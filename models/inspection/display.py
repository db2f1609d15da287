"""Images as pixels that a picture can show, and what is said where there is nothing to show."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class NothingToDraw(ValueError):
    """The model has no such thing; the message says in one line which and why."""


def display_pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(H, W, 3) in 0..1: RGB as it is, of other numbers of channels the first in grey.

    Shape:
        image: (C, H, W) float, normalised by `mean` and `std`
    """
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    array = (image.float().cpu() * scale + shift).clamp(0, 1).permute(1, 2, 0).numpy()
    return array if array.shape[2] == 3 else np.repeat(array[:, :, :1], 3, axis=2)
