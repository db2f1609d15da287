"""The learning rate as a pure function of samples seen, so that a change of world size never moves it."""

import math

from pipeline.config.optimizer import ScheduledOptimizerConfig
from pipeline.config.plan import StepPlan


class Schedule:
    """Of `config`, over the samples of `plan`.

    Linear from zero over the warm-up, then cosine or linear to `end_learning_rate` at the last sample; of the cosine no
    more than `cosine_share`. A constant schedule keeps its peak until the cool-down, then falls by 1 - sqrt
    (arXiv:2405.18392, section 3.2).
    """

    def __init__(self, config: ScheduledOptimizerConfig, plan: StepPlan):
        self.kind, self.peak, self.end = config.schedule, config.learning_rate, config.end_learning_rate
        self.samples, self.warmup, self.cosine_share = plan.samples, plan.warmup_samples, config.cosine_share
        self.falling = plan.cooldown_samples if self.kind == "constant" else max(1, self.samples - self.warmup)

    def rate(self, samples_seen: int) -> float:
        """Of the step that ends after so many images: so it is never zero at the first."""
        if samples_seen < self.warmup:
            return self.peak * samples_seen / self.warmup
        left = self.samples - samples_seen
        if left >= self.falling or not self.falling:
            return self.peak
        progress = 1 - left / self.falling if left > 0 else 1.0
        match self.kind:
            case "cosine":
                share = 0.5 * (1 + math.cos(math.pi * self.cosine_share * progress))
            case "linear":
                share = 1 - progress
            case "constant":
                share = 1 - math.sqrt(progress)
        return self.end + (self.peak - self.end) * share
