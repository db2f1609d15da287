"""The learning rate as a pure function of samples seen, so that a change of world size never moves it."""

import math

from pipeline.config.optimizer import OptimizerConfig


def learning_rate(config: OptimizerConfig, samples_seen: int, warmup_samples: int, total_samples: int) -> float:
    """The rate of the step that begins after `samples_seen` images.

    Linear from zero over `warmup_samples`, then cosine or linear to `end_learning_rate` at `total_samples`. The first
    step's rate is that of its own end, so it is never zero.
    """
    peak, end = config.learning_rate, config.end_learning_rate
    if samples_seen < warmup_samples:
        return peak * samples_seen / warmup_samples
    if config.schedule == "constant":
        return peak
    progress = min(1.0, (samples_seen - warmup_samples) / max(1, total_samples - warmup_samples))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return end + (peak - end) * share
