"""Weighted k-nearest-neighbour classification on frozen features."""

import torch
from torch import Tensor

NEIGHBOURS = 20
TEMPERATURE = 0.07
PAIRS_AT_A_TIME = 1 << 27  # similarities, 4 bytes each


def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, *, chunk: int | None = None
) -> Tensor:
    """Votes of the 20 nearest by cosine, each weighing exp(similarity / 0.07) (arXiv:1805.01978, section 3.4).

    Shape:
        train: (M, D), test: (S, D) float
        returns: (S, V)
    """
    chunk = chunk or max(1, PAIRS_AT_A_TIME // len(train))
    train = torch.nn.functional.normalize(train, dim=1)
    votes = torch.zeros(len(test), num_classes)
    for start in range(0, len(test), chunk):
        part = torch.nn.functional.normalize(test[start : start + chunk], dim=1)
        similarity, nearest = (part @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        weights = (similarity / TEMPERATURE).exp()
        votes[start : start + chunk].scatter_add_(1, train_labels[nearest], weights)
    return votes
