"""Few-shot classification by regularised least squares on frozen features (arXiv:2010.11929, section 4.1).

The targets are -1 and +1 per class, the solution is closed. Shots 1, 5, 10 and 25 and the strength 2^10 are those of
the evaluator of the paper's authors (big_vision, fewshot_lsr); five draws of the shots here, where it takes three.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.shards.order import permutation

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2, 3, 4)
STRENGTH = 2.0**10


def few_shot_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor, num_classes: int, shots: Sequence[int] = SHOTS
) -> dict[str, float]:
    """`top1_Nshot`: the mean over the draws, and `top1_Nshot_deviation`: their standard deviation (n - 1).

    Shots that a class has not enough images for are left out. A class without any training image is never decided for,
    its test images count as wrong, and `classes_without_images` says how many such classes there are.

    Shape:
        train: (M, D), test: (S, D) float
        train_labels: (M,), labels: (S,) int64
    """
    images = torch.bincount(train_labels, minlength=num_classes)
    least, absent = int(images[images > 0].min()), int((images == 0).sum())
    scores = {"classes_without_images": float(absent)} if absent else {}
    for shot in [shot for shot in shots if shot <= least]:
        accuracies = [
            _accuracy(
                train, train_labels, test, labels, num_classes, drawn_shots(train_labels, num_classes, shot, seed)
            )
            for seed in SEEDS
        ]
        scores[f"top1_{shot}shot"] = float(np.mean(accuracies))
        scores[f"top1_{shot}shot_deviation"] = float(np.std(accuracies, ddof=1))
    return scores | {"count": float(len(labels))}


def drawn_shots(labels: Tensor, num_classes: int, shot: int, seed: int) -> Tensor:
    """(num_classes x shot,) places of `shot` samples of each class that has any; more shots contain fewer."""
    places = []
    for label in range(num_classes):
        of_class = (labels == label).nonzero().squeeze(1)
        order = torch.from_numpy(permutation(len(of_class), seed, "few-shot", label))
        places.append(of_class[order[:shot]])
    return torch.cat(places)


def least_squares(features: Tensor, labels: Tensor, num_classes: int, scored: Tensor) -> Tensor:
    """(S, V) scores of a ridge regression to -1 and +1, features standardised by the (M, D) ones it learns from.

    The bias is a constant feature of 100, so that it is hardly held down.
    """
    features, scored = features.double(), scored.double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0) + 1e-5
    features, scored = (F.pad((part - mean) / deviation, (0, 1), value=100.0) for part in (features, scored))
    targets = 2.0 * F.one_hot(labels, num_classes).double() - 1.0
    if len(features) < features.shape[1]:  # the dual, which is the same and smaller
        gram = features @ features.T
        gram.diagonal().add_(STRENGTH)
        return scored @ (features.T @ torch.linalg.solve(gram, targets))
    gram = features.T @ features
    gram.diagonal().add_(STRENGTH)
    return scored @ torch.linalg.solve(gram, features.T @ targets)


def _accuracy(train, train_labels, test, labels, num_classes, places) -> float:
    scores = least_squares(train[places], train_labels[places], num_classes, test)
    scores[:, torch.bincount(train_labels, minlength=num_classes) == 0] = -torch.inf
    return float((scores.argmax(dim=1) == labels).double().mean())
