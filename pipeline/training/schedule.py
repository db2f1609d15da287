"""The learning rate as a pure function of samples seen, so that a change of world size never moves it."""

import math

from pipeline.config.optimizer import ScheduledOptimizerConfig
from pipeline.config.plan import StepPlan


def learning_rate(config: ScheduledOptimizerConfig, samples_seen: int, plan: StepPlan) -> float:
    """The rate of the step that ends after `samples_seen` images: so it is never zero at the first.

    Linear from zero over the warm-up, then cosine or linear to `end_learning_rate` at the last sample; of the cosine no
    more than `cosine_share`. A constant schedule keeps its peak until the cool-down, then falls by 1 - sqrt
    (arXiv:2405.18392, section 3.2).
    """
    peak, end, schedule = config.learning_rate, config.end_learning_rate, config.schedule
    if samples_seen < plan.warmup_samples:
        return peak * samples_seen / plan.warmup_samples
    falling = plan.cooldown_samples if schedule == "constant" else plan.samples - plan.warmup_samples
    if schedule == "constant" and not falling:
        return peak
    progress = min(1.0, max(0.0, 1 - (plan.samples - samples_seen) / max(1, falling)))
    match schedule:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * config.cosine_share * progress))
        case "linear":
            share = 1 - progress
        case "constant":
            share = 1 - math.sqrt(progress)
    return end + (peak - end) * share
