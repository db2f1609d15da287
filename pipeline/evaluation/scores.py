"""Scores of predictions: sums and counts, divided once."""

from torch import Tensor


def classification_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1, top-5 (all classes where there are fewer), mean top-1 per class, and the number of samples.

    Shape:
        logits: (S, V) float, any monotone score of each class
        labels: (S,) int64
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (S, 5)
    correct = top == labels.unsqueeze(1)
    first = correct[:, 0].double()
    per_class = [first[labels == label].mean() for label in labels.unique()]
    return {
        "top1": float(first.mean()),
        "top5": float(correct.any(dim=1).double().mean()),
        "mean_per_class": float(sum(per_class) / len(per_class)),
        "count": float(len(labels)),
    }
