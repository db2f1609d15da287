"""What changes the weights, and how fast."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Config, Fraction, NonNegative, Positive


class OptimizerConfig(Config):
    """AdamW (arXiv:1711.05101) with its learning-rate schedule, a pure function of samples seen."""

    learning_rate: Positive
    """At the end of warm-up; absolute, never scaled by the batch."""
    end_learning_rate: NonNegative = 0.0
    """At the last step."""
    warmup: NonNegative = 0.0
    """Linear warm-up from zero, in the unit of the run's length (epochs, steps or samples)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.05
    """Decoupled, on matrices only: norms, biases, tokens and positions are left alone."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning-rate factor from each block to the one below it. 1 is off."""
    max_grad_norm: NonNegative = 0.0
    """Clip the gradient's global norm to this. 0 is off, written as such (DeepSpeed's own default clips at 1)."""
