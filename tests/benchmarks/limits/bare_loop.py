"""The limit of this way to make a view: decode, crop, resize and flip the same bytes at the same boxes, from memory."""

from collections.abc import Iterator
from pathlib import Path

import simplejpeg
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tests.benchmarks.our_loader import View, passes_over_views

REQUIREMENTS = ()


def batches(workspace: Path, batch_size: int, image_size: int, num_images: int) -> Iterator[int]:
    for views in passes_over_views(workspace, batch_size, image_size, num_images):
        yield len(batch(views, image_size))


def batch(views: list[View], image_size: int) -> Tensor:
    """(B, C, H, W) uint8: the layout that the resize gives, so that nothing is spent on another."""
    images = torch.empty(len(views), 3, image_size, image_size, dtype=torch.uint8)
    for row, (content, (left, top, right, bottom), flip) in enumerate(views):
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(content)[top:bottom, left:right])
        resized = interpolate(
            pixels.permute(2, 0, 1)[None], size=(image_size, image_size), mode="bicubic", antialias=True
        )
        images[row] = (resized.flip(3) if flip else resized)[0]
    return images
