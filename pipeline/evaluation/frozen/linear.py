"""A linear probe on frozen, cached features."""

import warnings

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipeline.errors import InputError

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # scikit-learn's C: inverse of the L2 penalty
HELD_BACK = 0.2
ON_ONE_THREAD = 1 << 23  # numbers
ALONE = 1.0  # the strength where nothing can be held back: scikit-learn's own


def linear_scores(train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Log-probabilities of a multinomial logistic regression on standardised features.

    The penalty is chosen on a fifth of the training samples that is held back, never on the test split; then the probe
    is fitted again on all of them. Where that fifth has all samples of a class, one of them is not held back; where
    nothing is left of it, each class having one sample, the strength is 1. InputError where there is only one class.

    Shape:
        train: (M, D), test: (S, D) float
        returns: (S, V)
    """
    mean, deviation = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    features, scored = (((part - mean) / deviation).numpy() for part in (train, test))
    labels = train_labels.numpy()
    if len(known := np.unique(labels)) < 2:
        raise InputError(
            f"linear probe: all {len(labels)} training images are of class {known[0]}; it takes two classes"
        )
    fitted, held = held_back(labels)
    best = ALONE
    if len(held):
        accuracy = {strength: _fit(features[fitted], labels[fitted], strength).score(features[held], labels[held])
                    for strength in STRENGTHS}  # fmt: skip
        best = max(STRENGTHS, key=lambda strength: (accuracy[strength], -strength))
    probe = _fit(features, labels, best)
    scores = np.full((len(scored), num_classes), -np.inf)
    scores[:, probe.classes_] = probe.predict_log_proba(scored)
    return torch.from_numpy(scores)


def held_back(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the samples to fit, which are of every class, and of a fifth at most to choose by."""
    order = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
    cut = max(1, round(HELD_BACK * len(labels)))
    held, fitted = order[:cut], order[cut:]
    missing = np.setdiff1d(labels[held], labels[fitted])
    needed = np.array([np.flatnonzero(labels[held] == label)[0] for label in missing], int)  # the first of each
    return np.concatenate([fitted, held[needed]]), np.delete(held, needed)


def _fit(features: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    # Threads that wait for each other cost a small problem a hundred times its arithmetic where cores are busy.
    threads = 1 if features.size <= ON_ONE_THREAD else None
    with (
        threadpool_limits(threads),
        warnings.catch_warnings(),
    ):  # an unconverged probe in the sweep is scored like any other
        warnings.simplefilter("ignore")
        return LogisticRegression(C=strength, max_iter=500).fit(features, labels)
