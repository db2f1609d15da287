"""What every objective takes and returns, and what one may tell of its parameters.

An objective that predicts what it hides offers `hidden_predictions(images, positions)`, (predicted, target) with a row
for each hidden patch, (B, M, ...): numbers and their targets, of one shape, or scores and int64 classes.
"""

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


class Progress(NamedTuple):
    """Where a run stands at the end of a step, as shares of all its samples."""

    seen: float  # 0 to 1
    warmup: float  # of the learning rate

    @property
    def warmed_up(self) -> float:
        """Share of the warm-up that is behind."""
        return min(1.0, self.seen / self.warmup) if self.warmup else 1.0

    @property
    def after_warmup(self) -> float:
        """Share of what follows the warm-up that is behind."""
        return max(0.0, (self.seen - self.warmup) / (1 - self.warmup)) if self.warmup < 1 else 1.0


class Factors(NamedTuple):
    """What an objective multiplies into the optimizer's settings for one of its parameters."""

    learning_rate: float = 1.0
    weight_decay: float | None = None  # None: 1 or 0 by the optimizer's own rule


class Outcome(NamedTuple):
    """What the loop needs from an objective: a scalar to minimise, and sums over the micro-batch to report."""

    loss: Tensor  # () float32, mean over the micro-batch
    sums: dict[str, Tensor]  # each summed over samples; the loop divides once by the images seen
    losses: Tensor  # (B,) float32, of each sample, detached; 0 where a label is needed and there is none
