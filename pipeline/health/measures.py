"""What features say of the network that made them, without labels and with. All in float64: comparable over runs.

N images, D numbers each.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.objectives.batch import NO_LABEL
from pipeline.evaluation.frozen.few_shot import least_squares
from pipeline.evaluation.frozen.knn import knn_scores
from pipeline.health.verdicts import Value

EPS = 1e-7  # of RankMe
LEAST_RATIO = 4  # images per dimension: features alike in all directions give RankMe 0.93 D from 2 D, 0.97 D from 4 D


def rankme(features: Tensor) -> float:
    """exp(-sum p log p), p = s / sum s + 1e-7 of the singular values s (arXiv:2210.02885, equation 1). (N, D).

    From 1, where all features lie on one line through 0, to min(N, D).
    """
    features = features.double()
    gram = features.T @ features if len(features) >= features.shape[1] else features @ features.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    shares = values / values.sum() + EPS
    return math.exp(torch.special.entr(shares).sum().item())


def feature_spread(features: Tensor) -> float:
    """Mean over dimensions of the standard deviation of features of length 1, times sqrt(D) (arXiv:2011.10566, 4.1).

    1 where they point in all directions alike, 0 where all are the same. (N, D).
    """
    unit = F.normalize(features.double(), dim=1)
    return (unit.std(dim=0, correction=0).mean() * math.sqrt(unit.shape[1])).item()


def of_features(features: Tensor) -> list[Value]:
    """RankMe and spread; RankMe is not held against a band where there are fewer than 4 D images."""
    if not torch.isfinite(features).all():
        return [Value("rankme", math.nan), Value("feature_spread", math.nan)]
    count, width = features.shape
    enough = count >= LEAST_RATIO * width
    note = f"of {width} from {count:,} images{'' if enough else f', fewer than {LEAST_RATIO} for each dimension'}"
    return [Value("rankme", rankme(features), note, enough), Value("feature_spread", feature_spread(features))]


def of_labels(train: Tensor, train_labels: Tensor, held_out: Tensor, labels: Tensor, num_classes: int) -> list[Value]:
    """Top-1 on held-out images of 20 nearest neighbours and of ridge regression, learned from training images.

    [] where fewer than two classes are known, or no held-out image has a label.

    Shape:
        train: (M, D), held_out: (S, D) float
        train_labels: (M,), labels: (S,) int64, -1 where there is none
    """
    known, scored = train_labels != NO_LABEL, labels != NO_LABEL
    train, train_labels, held_out, labels = train[known], train_labels[known], held_out[scored], labels[scored]
    if len(train_labels.unique()) < 2 or not len(labels):
        return []
    if not (torch.isfinite(train).all() and torch.isfinite(held_out).all()):
        return [Value("knn_top1", math.nan), Value("ridge_top1", math.nan)]
    votes = knn_scores(train, train_labels, held_out, num_classes)
    scores = least_squares(train, train_labels, num_classes, held_out)
    scores[:, torch.bincount(train_labels, minlength=num_classes) == 0] = -torch.inf
    top1 = {"knn_top1": votes, "ridge_top1": scores}
    return [Value(name, (of.argmax(dim=1) == labels).double().mean().item()) for name, of in top1.items()]
