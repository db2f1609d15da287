"""detect-linear-v1: boxes from frozen patch tokens, one linear layer. Small, and no detector.

Each patch says which class of object has its centre in it, or none (a softmax with a background), and where the box of
that object lies: an object is its centre, as in CenterNet (arXiv:1904.07850), which also regresses offset and size by
L1; of two centres in one patch the smaller object counts, as in FCOS (arXiv:1904.01355). There is no neck, no pyramid,
no context beyond the token, no augmentation. So it says how much of what and where a patch token holds by itself, for
models to be compared; its AP is far below that of a fine-tuned detector, and it cannot tell apart objects whose
centres share a patch. Boxes are scored in the frame of the model's input.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.dense.fitting import ROWS_AT_A_TIME, PatchProbe
from pipeline.evaluation.dense.patches import Layout, SplitPatches

BOX_OUTPUTS = 4
LEAST_SCORE, BEFORE_NMS, NMS_IOU, MOST_DETECTIONS = 0.01, 1000, 0.6, 100
LOG_SIZE_RANGE = (-4.0, 5.0)  # of a box's side in patches


class Detections(NamedTuple):
    """Detections of many images, best first in each."""

    positions: Tensor  # (M,) int64, of the image in the split
    classes: Tensor  # (M,) int64
    scores: Tensor  # (M,) float32
    boxes: Tensor  # (M, 4) float32: left, top, right, bottom in pixels of the input


class Targets(NamedTuple):
    """What each patch should say; `boxes` counts only where `classes` is not the background."""

    classes: Tensor  # (B, N) int64
    boxes: Tensor  # (B, N, 4) float32


def outputs_of(classes: int) -> int:
    """A logit per class and one for the background, and the box."""
    return classes + 1 + BOX_OUTPUTS


def targets_of(boxes: Sequence[np.ndarray], classes: int, layout: Layout) -> Targets:
    """Shape: `boxes` (M, 5) of each image, as `SplitPatches.boxes` gives them."""
    (down, across), (height, width) = layout.grid, layout.input_size
    wanted = Targets(
        torch.full((len(boxes), down * across), classes), torch.zeros(len(boxes), down * across, BOX_OUTPUTS)
    )
    patch_height, patch_width = height / down, width / across
    for image, of_image in enumerate(boxes):
        area = (of_image[:, 2] - of_image[:, 0]) * (of_image[:, 3] - of_image[:, 1])
        for left, top, right, bottom, number in of_image[np.argsort(-area, kind="stable")]:  # the smallest last
            x, y = (left + right) / 2 / patch_width, (top + bottom) / 2 / patch_height
            column, row = min(int(x), across - 1), min(int(y), down - 1)
            patch = row * across + column
            sides = (max(right - left, 1e-3) / patch_width, max(bottom - top, 1e-3) / patch_height)
            wanted.classes[image, patch] = int(number)
            wanted.boxes[image, patch] = torch.tensor([x - column - 0.5, y - row - 0.5, *map(math.log, sides)])
    return wanted


def detection_loss(patches: SplitPatches, classes: int, device: torch.device):
    """Cross-entropy of all patches and L1 of the boxes of those with an object, both per object of the batch."""

    def loss(outputs: Tensor, rows: list[int]) -> Tensor:
        wanted = targets_of(patches.boxes(rows), classes, patches.layout)
        target, boxes = wanted.classes.to(device), wanted.boxes.to(device)
        there = target != classes
        found = F.cross_entropy(outputs[..., : classes + 1].flatten(0, 1), target.flatten(), reduction="sum")
        off = (outputs[..., classes + 1 :] - boxes).abs() * there.unsqueeze(-1)
        return (found + off.sum()) / there.sum().clamp_min(1)

    return loss


@torch.inference_mode()
def detect(probe: PatchProbe, patches: SplitPatches, classes: int, device: torch.device) -> Detections:
    """The detections in the rows of `patches`, at most 100 in an image, after non-maximum suppression by class."""
    positions, found = patches.positions(), []
    for rows in patches.chunks(ROWS_AT_A_TIME):
        outputs = probe(patches.tokens(rows).to(device)).cpu()
        for row, output in zip(rows, outputs, strict=True):
            kept = image_detections(output, classes, patches.layout)
            found.append((torch.full((len(kept[0]),), positions[row]), *kept))
    nothing = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, 4))
    return Detections(*(torch.cat(parts) for parts in zip(nothing, *found, strict=True)))


def image_detections(output: Tensor, classes: int, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(classes, scores, boxes) of one image, best first.

    Shape:
        output: (N, classes + 1 + 4)
    """
    from torchvision.ops import batched_nms

    scores = output[:, : classes + 1].softmax(dim=1)[:, :classes].flatten()  # (N x classes,)
    scores, places = scores.sort(descending=True, stable=True)
    kept = (scores > LEAST_SCORE)[:BEFORE_NMS].nonzero().squeeze(1)
    scores, places = scores[kept], places[kept]
    boxes, numbers = decoded_boxes(output[:, classes + 1 :], layout)[places // classes], places % classes
    kept = batched_nms(boxes, scores, numbers, NMS_IOU)[:MOST_DETECTIONS]
    return numbers[kept], scores[kept], boxes[kept]


def decoded_boxes(outputs: Tensor, layout: Layout) -> Tensor:
    """(N, 4) outputs of the patches as left, top, right, bottom, cut at the border of the input: the inverse of
    `targets_of`."""
    (down, across), (height, width) = layout.grid, layout.input_size
    patch = torch.tensor([width / across, height / down])
    rows, columns = (part.flatten() for part in torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij"))
    centre = (torch.stack([columns, rows], dim=1) + 0.5 + outputs[:, :2]) * patch
    half = outputs[:, 2:].clamp(*LOG_SIZE_RANGE).exp() * patch / 2
    most = torch.tensor([width, height], dtype=torch.float32)
    return torch.cat([(centre - half).clamp_min(0).minimum(most), (centre + half).clamp_min(0).minimum(most)], dim=1)
