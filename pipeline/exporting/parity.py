"""What an export lost of its source, and whether that is within its bounds. Pure."""

from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch

from pipeline.config.export import Bounds
from pipeline.evaluation.multilabel import multilabel_scores

MANY = 2048  # rows whose likeness to all others is computed at a time
# What outputs say of an image: a class; of each class whether it is there (sigmoid); which image is most alike.
Answer = Literal["class", "classes", "likeness"]


class Parity(NamedTuple):
    """Of an export beside its source, on the same images."""

    max_difference: float  # |difference| of an output
    largest: float  # |output| of the source
    spread: float  # greatest less least over the images, of that output of the source where it is largest
    agreement: float  # share of images
    accuracy: float | None  # of the export: top-1, or mean average precision; None without labels
    source_accuracy: float | None


def answer_of(num_classes: int, outputs: str) -> Answer:
    """What a model of so many classes, read by `outputs`, says of an image; a single output is yes or no."""
    if num_classes == 0:
        return "likeness"
    return "classes" if outputs == "sigmoid" or num_classes == 1 else "class"


def compared(source: np.ndarray, export: np.ndarray, labels: np.ndarray | None, answer: Answer) -> Parity:
    """Hold an export's outputs to its source's.

    Shape:
        source, export: (S, V) logits, or (S, D) features where the answer is a likeness
        labels: (S,) int64; (S, V) bool where images have several classes
    """
    ours, theirs = _said(source, answer), _said(export, answer)
    return Parity(
        float(np.abs(source - export).max()), float(np.abs(source).max()), float(np.ptp(source, axis=0).max()),
        float((ours == theirs).all(axis=1).mean()), _accuracy(export, labels), _accuracy(source, labels),
    )  # fmt: skip


def _said(outputs: np.ndarray, answer: Answer) -> np.ndarray:
    """(S, 1) a number for each image, or (S, V) whether it has each class: a sigmoid of more than one half."""
    match answer:
        case "class":
            return outputs.argmax(axis=1, keepdims=True)
        case "classes":
            return outputs > 0
        case "likeness":
            return _most_alike(outputs)[:, None]
        case _:
            assert_never(answer)


def _accuracy(logits: np.ndarray, labels: np.ndarray | None) -> float | None:
    if labels is None:
        return None
    if labels.ndim == 2:
        return multilabel_scores(torch.from_numpy(logits), torch.from_numpy(labels))["map"]
    return float((logits.argmax(axis=1) == labels).mean())


def _most_alike(features: np.ndarray) -> np.ndarray:
    """(S,) For each image the other image whose features, less the mean of all, have the least angle to its own."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True) + 1e-12
    found = []
    for start in range(0, len(centred), MANY):
        alike = centred[start : start + MANY] @ centred.T
        alike[np.arange(len(alike)), start + np.arange(len(alike))] = -np.inf
        found.append(alike.argmax(axis=1))
    return np.concatenate(found)


def unjudgeable(source: np.ndarray, answer: Answer) -> str | None:
    """Why nothing can be held to these outputs of a source; None where it can."""
    if not np.isfinite(source).all():
        return "the source itself answers with numbers that are not finite; its weights are damaged, name another step"
    if np.ptp(source, axis=0).max() <= 1e-6 * max(1e-12, np.abs(source).max()):
        return "the source answers the same to every image (is it trained?), so nothing can be compared with it"
    if len(np.unique(_said(source, answer), axis=0)) < 2:
        same = "names the same classes" if answer == "classes" else "names one class"
        return (
            f"the source {same if answer != 'likeness' else 'finds one image most alike'} for each of the "
            f"{len(source):,} images, so agreement would say nothing: train it for longer if it should tell them "
            "apart, else name images of several classes by --data"
        )
    return None


def out_of_bounds(source: np.ndarray, export: np.ndarray, parity: Parity | None, bounds: Bounds) -> str | None:
    """The first bound that an export breaks, in words; None where it keeps all. `parity` is None where it has none."""
    if source.shape != export.shape:
        return f"it answers with {export.shape} numbers, the source with {source.shape}"
    if parity is None or not np.isfinite(export).all():
        return "it answers with numbers that are not finite"
    share = parity.max_difference / parity.largest
    if not share <= bounds.max_difference:
        return (
            f"max |difference| {parity.max_difference:.3g} is {share:.3g} of the source's largest |output| "
            f"{parity.largest:.3g}, bounds.max_difference is {bounds.max_difference:g}"
        )
    share = parity.max_difference / parity.spread
    if not share <= bounds.max_share_of_spread:
        return (
            f"max |difference| {parity.max_difference:.3g} is {share:.3g} of the {parity.spread:.3g} that the source's "
            f"outputs differ between images, bounds.max_share_of_spread is {bounds.max_share_of_spread:g}"
        )
    if not parity.agreement >= bounds.min_agreement:
        return (
            f"it agrees with the source on {100 * parity.agreement:.2f} % of the images, bounds.min_agreement is "
            f"{bounds.min_agreement:g}"
        )
    if parity.accuracy is not None and not parity.source_accuracy - parity.accuracy <= bounds.max_accuracy_drop + 1e-12:
        return (
            f"accuracy {parity.accuracy:.4f} against the source's {parity.source_accuracy:.4f}, "
            f"bounds.max_accuracy_drop is {bounds.max_accuracy_drop:g}"
        )
    return None
