"""What every objective takes and returns."""

from typing import NamedTuple

from torch import Tensor

NO_LABEL = -1


class Batch(NamedTuple):
    """One micro-batch, augmented and normalised, on the device."""

    images: Tensor  # (B, C, H, W) in the compute dtype
    labels: Tensor  # (B,) int64, -1 where the sample has none
    positions: Tensor  # (B,) int64: place of the sample in the run; all randomness derives from it
    mixed_labels: Tensor | None = None  # (B,) int64: label of the image mixed in
    mix_weights: Tensor | None = None  # (B,) float32: weight of the first label


class Outcome(NamedTuple):
    """What the loop needs from an objective: a scalar to minimise, and sums over the micro-batch to report."""

    loss: Tensor  # () float32, mean over the micro-batch
    sums: dict[str, Tensor]  # each summed over samples; the loop divides once by the images seen
    losses: Tensor  # (B,) float32, of each sample, detached; 0 where a label is needed and there is none
