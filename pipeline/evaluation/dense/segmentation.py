"""segment-linear-v1: which class each pixel has, from one linear layer on frozen patch tokens.

DINOv2's linear protocol (arXiv:2304.07193, section 7.4; its BatchNorm, linear layer and bilinear upsampling) on the
last block after the final norm, in one pass over the whole input: neither several scales nor a sliding window, and
masks are scored in the frame of the model's input, which leaves out what its centre crop cuts off. So numbers are a
little lower than in papers whose protocol has those.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.dense.fitting import ROWS_AT_A_TIME, PatchProbe
from pipeline.evaluation.dense.patches import SplitPatches
from pipeline.evaluation.scores import Scored
from pipeline.shards.annotations import IGNORED

INTERSECTION, PREDICTED, LABELLED = range(3)  # the areas of a class in an image, pixels


class Upsampling:
    """Bilinear, corners not aligned, as `F.interpolate`; by two products with fixed matrices, whose gradient is
    the same every time on an accelerator too."""

    def __init__(self, grid: tuple[int, int], size: tuple[int, int], device: torch.device):
        self.grid = grid
        self.down, self.across = (_weights(*sides).to(device) for sides in zip(grid, size, strict=True))

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, N, V) -> (B, V, H, W)"""
        planes = logits.unflatten(1, self.grid).permute(0, 3, 1, 2)  # (B, V, h, w)
        return self.down @ planes @ self.across.T


def _weights(patches: int, pixels: int) -> Tensor:
    """(pixels, patches): how much each patch counts at each pixel."""
    unit = torch.eye(patches).unsqueeze(0)  # (1, patches, patches): one line of patches per channel
    return F.interpolate(unit, size=pixels, mode="linear", align_corners=False)[0].T.contiguous()


def segmentation_loss(patches: SplitPatches, upsample: Upsampling, device: torch.device):
    """The mean cross-entropy over the pixels of a batch that count; 0 where none does."""

    def loss(logits: Tensor, rows: list[int]) -> Tensor:
        masks = patches.masks(rows).to(device)
        total = F.cross_entropy(upsample(logits), masks, ignore_index=IGNORED, reduction="sum")
        return total / (masks != IGNORED).sum().clamp_min(1)

    return loss


@torch.inference_mode()
def areas_of(probe: PatchProbe, patches: SplitPatches, upsample: Upsampling, classes: int, device) -> Tensor:
    """(S, 3, V) int64 areas of the rows of `patches`: `class_areas` of each."""
    found = [torch.zeros(0, 3, classes, dtype=torch.int64)]
    for rows in patches.chunks(ROWS_AT_A_TIME):
        predicted = upsample(probe(patches.tokens(rows).to(device))).argmax(dim=1).cpu()
        found.append(torch.stack([class_areas(*pair, classes)
                                  for pair in zip(predicted, patches.masks(rows), strict=True)]))  # fmt: skip
    return torch.cat(found)


def class_areas(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """(3, V) int64: pixels of each class that are rightly predicted, predicted, and labelled, of those that count.

    Shape:
        predicted, mask: (H, W) int64
    """
    counts = mask != IGNORED
    predicted, mask = predicted[counts], mask[counts]
    parts = (mask[predicted == mask], predicted, mask)
    return torch.stack([torch.bincount(part, minlength=classes) for part in parts])


def segmentation_scores(areas: Tensor, names: list[str], *, bootstrap_samples: int, seed: int = 0) -> Scored:
    """Mean IoU over the classes that are labelled or predicted anywhere, and the share of pixels that are right.

    Sums of counts over all images, divided once. The interval redraws images (bootstrap, 95 %).

    Shape:
        areas: (S, 3, V) int64
    """
    values = areas.double().numpy()
    iou, accuracy = _iou_and_accuracy(values.sum(axis=0)[None])
    generator, count = np.random.Generator(np.random.Philox(seed)), len(values)
    means, accuracies = [], []
    for start in range(0, bootstrap_samples, 64):
        size = min(64, bootstrap_samples - start)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)
        of_draw = _iou_and_accuracy(np.tensordot(drawn, values, axes=1))
        means.append(_mean(of_draw[0]))
        accuracies.append(of_draw[1])
    metrics = {"mean_iou": float(_mean(iou)[0]), "pixel_accuracy": float(accuracy[0]), "count": float(count)}
    intervals = {
        name: tuple(np.nanquantile(np.concatenate(drawn), [0.025, 0.975]).tolist())
        for name, drawn in (("mean_iou", means), ("pixel_accuracy", accuracies))
    }
    total = values.sum(axis=0).astype(np.int64)
    rows = [
        (name, int(total[LABELLED, number]), "" if np.isnan(iou[0, number]) else f"{iou[0, number]:.4f}")
        for number, name in enumerate(names)
    ]
    return Scored(metrics, intervals, per_class=[("class", "pixels", "iou"), *rows])


def _iou_and_accuracy(areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, V) IoU, nan for a class that does not occur, and (R,) accuracy, of (R, 3, V) areas."""
    right, predicted, labelled = areas[:, INTERSECTION], areas[:, PREDICTED], areas[:, LABELLED]
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / (predicted + labelled - right), right.sum(axis=1) / labelled.sum(axis=1)


def _mean(iou: np.ndarray) -> np.ndarray:
    """(R,) over the classes that occur; 0 where none does."""
    occurs = ~np.isnan(iou)
    return np.where(occurs, iou, 0).sum(axis=1) / occurs.sum(axis=1).clip(1)
