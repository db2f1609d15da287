"""Masks and boxes where `evaluation_view` puts the pixels that they belong to."""

import numpy as np
from PIL import Image

from pipeline.shards.annotations import IGNORED
from pipeline.views.evaluation import EvaluationInput, centre_overlap, resized_size
from pipeline.views.geometry import without_far_ends


def mask_view(values: np.ndarray, inputs: EvaluationInput) -> np.ndarray:
    """The mask of an evaluation input: resized by the nearest pixel, and ignored where the input is padded.

    Shape:
        values: (h, w) uint8
        returns: (H, W) uint8
    """
    if inputs.crop_mode == "center":
        values = without_far_ends(values)
    resized = resized_size(values.shape, inputs.size, inputs.crop, inputs.crop_mode)
    moved = np.asarray(Image.fromarray(values).resize(resized[::-1], Image.Resampling.NEAREST))
    source, target = centre_overlap(resized, inputs.size)
    out = np.full(inputs.size, IGNORED, np.uint8)
    out[target] = moved[source]
    return out


def boxes_view(boxes: np.ndarray, size: tuple[int, int], inputs: EvaluationInput) -> tuple[np.ndarray, np.ndarray]:
    """Boxes in pixels of an evaluation input, cut at its border, and which of them are in it: those whose centre is.

    Shape:
        boxes: (M, 4) float, x, y, width, height in an image of `size`, (height, width)
        returns: (M, 4) float64, left, top, right, bottom; (M,) bool
    """
    shape = without_far_ends(np.empty((*size, 0), np.uint8)).shape[:2] if inputs.crop_mode == "center" else size
    resized = resized_size(shape, inputs.size, inputs.crop, inputs.crop_mode)
    source, target = centre_overlap(resized, inputs.size)
    moved = []
    for axis, (side, whole) in enumerate(((1, size[1]), (0, size[0]))):  # x, then y
        start = max(0, whole - shape[side]) // 2
        scale, shift = resized[side] / shape[side], target[side].start - source[side].start
        near = (boxes[:, axis] - start) * scale + shift
        moved.append((near, near + boxes[:, 2 + axis] * scale, inputs.size[side]))
    inside = np.all([((near + far) / 2 >= 0) & ((near + far) / 2 < side) for near, far, side in moved], axis=0)
    (left, right, width), (top, bottom, height) = moved
    cut = np.stack([left.clip(0, width), top.clip(0, height), right.clip(0, width), bottom.clip(0, height)], axis=1)
    return cut, inside
