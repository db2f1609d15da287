"""The guard of a training run: whether a step was bad, and when to go back and leave the samples that led there.

Decided from the results that all ranks agreed on, so all decide alike without another word. A step whose loss or
gradient is not finite never changes the weights; one whose loss leaps has changed them when it is found. Both count.
"""

import logging
import math
import statistics
from collections import deque
from typing import NamedTuple

from pipeline.config.guard import GuardConfig
from pipeline.training.engine import StepResult

WINDOW = 128  # recent good losses that a leap is judged by
LEAST = 20  # of them, before any is judged
FLOOR = 1e-3  # of the median: the least deviation, so that a loss that hardly moves makes no leap of a hair
log = logging.getLogger(__name__)


class BadSteps(NamedTuple):
    """Steps [first, last] that a run goes back to before, to pass over what they read."""

    first: int
    last: int


class Guard:
    """Judges the steps of a run in `precision` that has rolled back `roll_backs` times so far."""

    def __init__(self, config: GuardConfig, precision: str, roll_backs: int = 0):
        self.config, self.precision, self.roll_backs = config, precision, roll_backs
        self._threshold = config.spike_threshold
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._bad: list[int] = []  # steps, without a good one among them

    @property
    def in_doubt(self) -> bool:
        """Whether the newest steps were bad: no time for a checkpoint that a roll-back would have to distrust."""
        return bool(self._bad)

    def judge(self, step: int, result: StepResult) -> BadSteps | None:
        """Take the result of a step: those to go back over, where it is one bad step too many in a row.

        FloatingPointError where the run has gone back as often as it may.
        """
        if result.skipped and result.loss_scale is not None:  # fp16 is finding its scale; the engine knows its floor
            return None
        leap = self._threshold > 0 and self._is_leap(result.loss)
        if not result.skipped and not leap:
            self._losses.append(result.loss)
            self._bad = []
            return None
        log.warning(
            "step %d is bad: %s (loss %.4g, gradient norm %.4g)", step + 1,
            "the loss leapt" if leap else "not finite, the weights were left alone", result.loss, result.gradient_norm,
        )  # fmt: skip
        self._bad.append(step)
        if len(self._bad) < self.config.max_skipped:
            return None
        first, self._bad = self._bad[0], []
        if self.roll_backs >= self.config.max_roll_backs:
            raise FloatingPointError(
                f"the loss or the gradient was bad for {self.config.max_skipped} steps in a row, {first + 1} to "
                f"{step + 1}, after {self.roll_backs} roll-backs; in a new run lower optimizer.learning_rate, clip "
                f"harder with optimizer.max_grad_norm{'' if self.precision == 'fp32' else ', or try precision: fp32'}"
            )
        self.roll_backs += 1
        return BadSteps(first, step)

    def _is_leap(self, loss: float) -> bool:
        if len(self._losses) < LEAST or not math.isfinite(loss):
            return False
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(one - median) for one in self._losses)
        return loss - median > self._threshold * max(deviation, FLOOR * abs(median))
