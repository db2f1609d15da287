"""What an export lost of its source, and whether that is within its bounds. Pure."""

from typing import NamedTuple

import numpy as np

from pipeline.config.export import Bounds

MANY = 2048  # rows whose likeness to all others is computed at a time


class Parity(NamedTuple):
    """Of an export beside its source, on the same images."""

    max_difference: float  # |difference| of an output
    largest: float  # |output| of the source
    agreement: float  # share of images
    accuracy: float | None  # of the export; None without labels
    source_accuracy: float | None


def compared(source: np.ndarray, export: np.ndarray, labels: np.ndarray | None, *, head: bool) -> Parity:
    """Hold an export's outputs to its source's.

    Shape:
        source, export: (S, V) logits, or (S, D) features where there is no `head`
        labels: (S,) int64
    """
    said = [_first_class(outputs) if head else _most_alike(outputs) for outputs in (source, export)]
    accuracies = [None if labels is None else float((one == labels).mean()) for one in said]
    return Parity(
        float(np.abs(source - export).max()), float(np.abs(source).max()), float((said[0] == said[1]).mean()),
        accuracies[1], accuracies[0],
    )  # fmt: skip


def _first_class(logits: np.ndarray) -> np.ndarray:
    return logits.argmax(axis=1)


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


def unjudgeable(source: np.ndarray) -> str | None:
    """Why nothing can be held to these outputs of a source; None where it can."""
    if not np.isfinite(source).all():
        return "the source itself answers with numbers that are not finite; its weights are damaged, name another step"
    if np.ptp(source, axis=0).max() <= 1e-6 * max(1e-12, np.abs(source).max()):
        return "the source answers the same to every image (is it trained?), so nothing can be compared with it"
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
