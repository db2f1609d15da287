"""Average precision of detections as COCO defines it (arXiv:1405.0312): what pycocotools counts, to which a test holds
it, without its areas, crowds and files.

Images are matched once; a score of redrawn images only weighs what was matched, so an interval costs little.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from pipeline.evaluation.dense.detection import Detections
from pipeline.evaluation.scores import Scored

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
RECALLS = np.linspace(0, 1, 101)
DRAWS_AT_A_TIME = 32


class Matched(NamedTuple):
    """Detections of one class, best first, and whose objects there are."""

    images: np.ndarray  # (M,) int64, number of the image
    hits: np.ndarray  # (T, M) bool, whether it is a true positive at each threshold
    objects: np.ndarray  # (S,) int64, objects of the class in each image


def detection_scores(
    found: Detections, boxes: list[np.ndarray], names: list[str], *, bootstrap_samples: int, seed: int = 0
) -> Scored:
    """`ap50`, at an IoU of 0.5, and `ap`, the mean over 0.5:0.95, over the classes that have objects.

    The intervals redraw images (bootstrap, 95 %).

    Shape:
        boxes: (M, 5) of each image of the split in order, left, top, right, bottom, class; a detection's position is
            the image's number
    """
    matched = [match_class(found, boxes, number) for number in range(len(names))]
    everything = _scores(matched, np.ones((1, len(boxes))))  # (1, classes, T)
    generator, drawn = np.random.Generator(np.random.Philox(seed)), []
    for start in range(0, bootstrap_samples, DRAWS_AT_A_TIME):
        size = min(DRAWS_AT_A_TIME, bootstrap_samples - start)
        weights = generator.multinomial(len(boxes), np.full(len(boxes), 1 / len(boxes)), size=size)
        drawn.append(_scores(matched, weights.astype(np.float64)))
    drawn = np.concatenate(drawn)
    metrics, intervals = {"count": float(len(boxes))}, {}
    for name, thresholds in (("ap50", slice(0, 1)), ("ap", slice(None))):
        metrics[name] = float(_mean_of_classes(everything[..., thresholds])[0])
        intervals[name] = tuple(np.quantile(_mean_of_classes(drawn[..., thresholds]), [0.025, 0.975]).tolist())
    rows = [
        (name, int(one.objects.sum()), *("" if np.isnan(value).all() else f"{value.mean():.4f}"
                                         for value in (everything[0, number, :1], everything[0, number])))
        for number, (name, one) in enumerate(zip(names, matched, strict=True))
    ]  # fmt: skip
    return Scored(metrics, intervals, per_class=[("class", "objects", "ap50", "ap"), *rows])


def match_class(found: Detections, boxes: list[np.ndarray], number: int) -> Matched:
    """Give each detection, best first, the object of most overlap in its image that no better one has."""
    mine = found.classes == number
    images, scores, rectangles = found.positions[mine], found.scores[mine], found.boxes[mine]
    order = torch.from_numpy(np.argsort(-scores.numpy(), kind="stable"))
    images, rectangles = images[order].numpy(), rectangles[order]
    objects = np.array([int((of_image[:, 4] == number).sum()) for of_image in boxes], dtype=np.int64)
    hits = np.zeros((len(THRESHOLDS), len(images)), bool)
    for image in np.unique(images[objects[images] > 0]):
        places = np.flatnonzero(images == image)
        truth = torch.from_numpy(boxes[image][boxes[image][:, 4] == number][:, :4]).float()
        hits[:, places] = _greedy(box_iou(rectangles[places], truth))
    return Matched(images, hits, objects)


def _greedy(overlaps: Tensor) -> np.ndarray:
    """(T, M) hits of M detections, best first, with these (M, G) overlaps."""
    overlaps = overlaps.double().numpy()
    free = np.ones((len(THRESHOLDS), overlaps.shape[1]), bool)
    hits = np.zeros((len(THRESHOLDS), len(overlaps)), bool)
    every = np.arange(len(THRESHOLDS))
    for number, row in enumerate(overlaps):
        may = free & (row >= THRESHOLDS[:, None] - 1e-10)
        best = np.where(may, row, -1.0).argmax(axis=1)
        hits[:, number] = may[every, best]
        free[every, best] &= ~hits[:, number]
    return hits


def _scores(matched: list[Matched], weights: np.ndarray) -> np.ndarray:
    """(R, classes, T) average precisions, nan where a class has no objects; `weights` is (R, S), images drawn."""
    return np.stack([_average_precisions(one, weights) for one in matched], axis=1)


def _average_precisions(one: Matched, weights: np.ndarray) -> np.ndarray:
    """(R, T): the mean over 101 recalls of the best precision at that recall or a greater one."""
    total = weights @ one.objects  # (R,)
    out = np.zeros((len(weights), len(THRESHOLDS)))
    of_detection = weights[:, one.images]  # (R, M)
    seen = of_detection.cumsum(axis=1)
    for threshold, hits in enumerate(one.hits):
        right = (of_detection * hits).cumsum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.nan_to_num(right / seen)
            recall = right / total[:, None]
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        best = np.concatenate([best, np.zeros((len(weights), 1))], axis=1)  # recalls that are not reached
        for draw in range(len(weights)):
            places = np.searchsorted(recall[draw], RECALLS, side="left")
            out[draw, threshold] = best[draw, places].mean()
    out[total == 0] = np.nan
    return out


def _mean_of_classes(values: np.ndarray) -> np.ndarray:
    """(R,) of (R, classes, T): over classes that have objects; 0 where none has."""
    per_class = values.mean(axis=2)
    there = ~np.isnan(per_class)
    return np.where(there, per_class, 0).sum(axis=1) / there.sum(axis=1).clip(1)
