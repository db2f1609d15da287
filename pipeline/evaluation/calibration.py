"""How far a classifier's confidence can be trusted (arXiv:1706.04599)."""

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 15


def calibration_scores(
    logits: Tensor, labels: Tensor, selection: tuple[Tensor, Tensor] | None = None
) -> dict[str, float]:
    """ECE over 15 bins of equal width (equation 3), mean negative log-likelihood and Brier score.

    With `selection`, logits and labels of a split that is not scored, also the ECE and the likelihood after one
    temperature that was fitted there (section 4.2).

    Shape:
        logits: (S, V) float, log-probabilities up to a constant
        labels: (S,) int64
    """
    scores = _scores(logits.double(), labels)
    if selection is not None:
        temperature = fitted_temperature(selection[0].double(), selection[1])
        scaled = _scores(logits.double() / temperature, labels)
        scores |= {"temperature": temperature, "ece_scaled": scaled["ece"], "nll_scaled": scaled["nll"]}
    return scores | {"count": float(len(labels))}


def expected_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """The mean over samples of |accuracy - confidence| of their bins.

    Shape:
        confidence: (S,) in 0..1
        correct: (S,) 0 or 1
    """
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1  # (lower, upper], as in the paper
    zeros = torch.zeros(BINS, dtype=torch.float64)
    gap = zeros.index_add(0, bins, correct.double()) - zeros.index_add(0, bins, confidence.double())
    return float(gap.abs().sum() / len(confidence))


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of least negative log-likelihood: convex in its inverse, found by Newton's method in 1-D."""
    inverse = 1.0
    for _ in range(100):
        scaled = logits * inverse
        probabilities = scaled.softmax(dim=1)
        mean = (probabilities * logits).sum(dim=1)
        slope = float((mean - logits.gather(1, labels.unsqueeze(1)).squeeze(1)).mean())
        curvature = float(((probabilities * logits.square()).sum(dim=1) - mean.square()).mean())
        step = max(-inverse, min(0.5 * inverse, slope / max(curvature, 1e-12)))  # within a factor of two
        inverse -= step
        if not 1e-4 < inverse < 1e4:  # all right, or all wrong: no temperature is best
            return 1.0 / min(max(inverse, 1e-4), 1e4)
        if abs(step) < 1e-10 * inverse:
            break
    return 1.0 / inverse


def _scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    probabilities = logits.softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    target = F.one_hot(labels, logits.shape[1])
    return {
        "ece": expected_calibration_error(confidence, predicted == labels),
        "nll": float(F.cross_entropy(logits, labels)),
        "brier": float((probabilities - target).square().sum(dim=1).mean()),
    }
