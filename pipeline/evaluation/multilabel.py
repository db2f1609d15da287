"""Scores of images that may be of several classes: average precision of each class, and F1 at one half."""

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor


def multilabel_scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """`map`: the mean over classes of the average precision; `f1_micro` over all decisions at a sigmoid of 0.5, and
    `f1_macro`, its mean over classes. A class that no sample has counts in neither mean.

    Shape:
        logits: (S, V) float
        targets: (S, V) bool
    """
    there = targets.any(dim=0)
    precisions = [
        average_precision_score(targets[:, one].numpy(), logits[:, one].double().numpy())
        for one in there.nonzero().squeeze(1).tolist()
    ]
    said = logits > 0
    hits, wrong, missed = (
        (one & other).sum(dim=0).double() for one, other in ((said, targets), (said, ~targets), (~said, targets))
    )
    per_class = 2 * hits / (2 * hits + wrong + missed).clamp_min(1)
    micro = 2 * hits.sum() / (2 * hits + wrong + missed).sum().clamp_min(1)
    return {
        "map": float(np.mean(precisions)), "f1_micro": float(micro), "f1_macro": float(per_class[there].mean()),
        "count": float(len(targets)),
    }  # fmt: skip


def targets_of(labels: Tensor, matrix: np.ndarray) -> Tensor:
    """(S, V) bool, of labels that stand for sets of classes.

    Shape:
        labels: (S,) int64
        matrix: (sets, V), whether a set holds a class
    """
    return torch.from_numpy(np.asarray(matrix, dtype=bool))[labels]
