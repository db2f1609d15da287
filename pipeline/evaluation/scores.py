"""Scores of predictions, with their intervals: sums and counts, divided once."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.intervals import interval_of_counts, interval_of_mean


@dataclass
class Scored:
    """What a protocol says of a model on a split: metrics by name, intervals of some of them, and the predictions.

    `predictions` holds (S,) tensors `predicted`, `labels`, `correct` and `confidence`, in the order of the split; None
    for a protocol that does not decide sample by sample.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    predictions: dict[str, Tensor] | None = None
    per_class: list[tuple] | None = None  # a table of dense protocols, its header first


def classification_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5 (all classes where there are fewer), mean top-1 per class, and the number of samples.

    Shape:
        logits: (S, V) float, any monotone score of each class
        labels: (S,) int64
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (S, 5)
    correct = top == labels.unsqueeze(1)
    first = (logits.topk(1, dim=1).indices == labels.unsqueeze(1))[:, 0].double()
    right, counts = _per_class(first, labels, logits.shape[1])
    seen = counts > 0
    return {
        "top1": float(first.mean()),
        "top5": float(correct.any(dim=1).double().mean()),
        "mean_per_class": float((right[seen] / counts[seen]).mean()),
        "count": float(len(labels)),
    }


def classified(logits: Tensor, labels: Tensor, *, bootstrap_samples: int, calibrated: bool = False) -> Scored:
    """The scores of a classification with their intervals and predictions.

    `calibrated`: whether logits are log-probabilities up to a constant; the confidence of others is their softmax too,
    and says only which decisions were close.
    """
    metrics = classification_scores(logits, labels)
    predicted = logits.topk(1, dim=1).indices.squeeze(1)  # as for top-1: two ways may break a tie differently
    confidence = logits.float().softmax(dim=1).gather(1, predicted.unsqueeze(1)).squeeze(1)
    correct = (predicted == labels).float()
    count = int(metrics["count"])

    def of_total(share: float) -> tuple[float, float]:
        hits = round(share * count)
        return interval_of_counts(
            np.array([hits, count - hits]), lambda drawn: drawn[:, 0] / count, samples=bootstrap_samples
        )

    right, per_class = (part.numpy() for part in _per_class(correct.double(), labels, logits.shape[1]))
    cells = np.concatenate([right, per_class - right]).astype(np.int64)
    intervals = {
        "top1": of_total(metrics["top1"]),
        "top5": of_total(metrics["top5"]),
        "mean_per_class": interval_of_counts(cells, _mean_per_class, samples=bootstrap_samples),
    }
    predictions = {"predicted": predicted, "labels": labels, "correct": correct, "confidence": confidence}
    return Scored(metrics, intervals, predictions)


def mean_of(name: str, values: Tensor, *, bootstrap_samples: int) -> Scored:
    """A score that is the mean of one value per sample."""
    array = values.double().numpy()
    return Scored({name: float(array.mean())}, {name: interval_of_mean(array, samples=bootstrap_samples)})


def _per_class(correct: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """(V,) how many of each class are right, and how many there are."""
    size = max(num_classes, int(labels.max()) + 1)
    zeros = torch.zeros(size, dtype=torch.float64)
    return zeros.index_add(0, labels, correct), zeros.index_add(0, labels, torch.ones_like(correct))


def _mean_per_class(drawn: np.ndarray) -> np.ndarray:
    right, wrong = np.split(drawn, 2, axis=1)
    counts = right + wrong
    with np.errstate(invalid="ignore"):
        shares = np.where(counts > 0, right / counts, np.nan)
    return np.nanmean(shares, axis=1)
