"""From the bytes of an image to an evaluation input, without chance: the very pixels that timm's evaluation transform
makes of them, so that a registered model is served as it was scored.

Hence Pillow's resize for grey and RGB; timm has no say in other channels and depths, which are resized in torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.views.geometry import fitting_size, without_far_ends
from pipeline.views.pixels import decode_pixels, resize_into, unit_values


@dataclass(frozen=True)
class EvaluationInput:
    """How an image becomes an input of a model; see `evaluation_view`. `mean` is per channel, 0..1."""

    size: tuple[int, int]  # (height, width)
    channels: int
    crop: float
    crop_mode: str
    mean: tuple[float, ...]

    def write(self, content: bytes, extension: str, out: np.ndarray) -> None:
        """`evaluation_view` of this input.

        Shape:
            out: (height, width, channels)
        """
        evaluation_view(content, extension, out, crop=self.crop, crop_mode=self.crop_mode, mean=self.mean)


def evaluation_view(
    content: bytes, extension: str, out: np.ndarray, *, crop: float, crop_mode: str, mean: Sequence[float]
) -> None:
    """Write an evaluation input into `out`; raises ImageFault as `training_view` does.

    The image is first resized for a frame of the size of `out` divided by `crop`, and `crop_mode` says how: `center`
    covers the frame, `squash` fills it without keeping the ratio, `border` fits into it and pads with `mean` (per
    channel, 0..1). Then the centre is cut out.

    Shape:
        out: (H, W, C), contiguous; uint8, or float32 as `pixels.view_dtype` says
    """
    pixels = decode_pixels(content, extension, out.shape[2])
    if crop_mode == "center":
        pixels = without_far_ends(pixels)
    _cut_centre(_resized(pixels, resized_size(pixels.shape[:2], out.shape[:2], crop, crop_mode)), out, mean)


def resized_size(size: tuple[int, int], out_size: tuple[int, int], crop: float, crop_mode: str) -> tuple[int, int]:
    """(height, width) of an image before its centre is cut out; `size` is without far ends where the crop covers."""
    frame = tuple(math.floor(side / crop) for side in out_size)
    match crop_mode:
        case "center":
            return _covering_size(size, frame)
        case "squash":
            return frame
        case "border":
            return fitting_size(size, frame)
        case _:
            raise ValueError(f"crop mode {crop_mode!r} is none of center, squash, border")


def _covering_size(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """The resized image that covers the frame, its ratio kept, rounded as timm rounds."""
    if frame[0] == frame[1]:  # torchvision's Resize, which cuts the longer side's fraction off
        least = min(size)
        return tuple(frame[0] if side == least else int(frame[0] * side / least) for side in size)
    ratio = min(size[0] / frame[0], size[1] / frame[1])  # timm's ResizeKeepRatio, which rounds
    return round(size[0] / ratio), round(size[1] / ratio)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[:2] == size and pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC)).reshape(*size, pixels.shape[2])
    resized = np.empty((*size, pixels.shape[2]), np.uint8 if pixels.dtype == np.uint8 else np.float32)
    resize_into(pixels, resized)
    return resized


def _cut_centre(pixels: np.ndarray, out: np.ndarray, mean: Sequence[float]) -> None:
    """Write the centre of the image into `out`, and `mean` around an image that is smaller."""
    source, target = centre_overlap(pixels.shape[:2], out.shape[:2])
    if pixels.shape[0] < out.shape[0] or pixels.shape[1] < out.shape[1]:
        out[...] = [round(255 * value) for value in mean] if out.dtype == np.uint8 else mean
    out[target] = pixels[source] if pixels.dtype == out.dtype else unit_values(pixels[source], out.dtype)


def centre_overlap(size: tuple[int, int], out_size: tuple[int, int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a resized image that is seen, and where it lies in the input."""
    return tuple(zip(*(_overlap(*sides) for sides in zip(size, out_size, strict=True)), strict=True))


def _overlap(have: int, want: int) -> tuple[slice, slice]:
    """Along one side: the part of the image that is seen, and where it lies in the input (timm's CenterCropOrPad)."""
    if have >= want:
        start = int(round((have - want) / 2))
        return slice(start, start + want), slice(0, want)
    start = (want - have) // 2
    return slice(0, have), slice(start, start + have)
