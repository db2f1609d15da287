"""What changes the weights, and how fast."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from models.schema import NOT_A_SWITCH, Config, NonNegative, Positive, Rate, Share


class ScheduledOptimizerConfig(Config):
    """What every optimizer has: a learning rate that is a pure function of samples seen, decay and clipping."""

    learning_rate: Positive
    """At the end of warm-up; absolute, never scaled by the batch."""
    end_learning_rate: NonNegative = 0.0
    """At the last step; of a constant schedule, at the end of its cool-down."""
    warmup: NonNegative = 0.0
    """Linear warm-up from zero, in the unit of the run's length (epochs, steps or samples)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up. A run at a constant rate may be extended: `vit resume RUN --set epochs=...`"""
    cosine_share: Share = 1.0
    """How much of a cosine schedule's half wave the run goes through: 0.8 stops where a tenth of the fall is left."""
    cooldown: NonNegative = 0.0
    """Length of a constant schedule's fall to `end_learning_rate` at the end of the run, in the unit of warm-up."""
    weight_decay: NonNegative = 0.05
    """On matrices only: norms, biases, tokens and positions are left alone."""
    layer_decay: Share = 1.0
    """Learning-rate factor from each block to the one below it. 1 is off."""
    max_grad_norm: NonNegative = 0.0
    """Clip the gradient's global norm to this. 0 is off, written as such (DeepSpeed's own default clips at 1)."""

    @model_validator(mode="after")
    def _only_a_constant_rate_cools_down(self) -> "ScheduledOptimizerConfig":
        if self.cooldown and self.schedule != "constant":
            raise ValueError(f"cooldown {self.cooldown:g} needs schedule: constant; {self.schedule} falls by itself")
        return self


class AdamWConfig(ScheduledOptimizerConfig):
    """AdamW (arXiv:1711.05101): weight decay decoupled from the gradient."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""


class SGDConfig(ScheduledOptimizerConfig):
    """Stochastic gradient descent with momentum; weight decay is added to the gradient."""

    kind: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(gt=0, lt=1), NOT_A_SWITCH] = 0.9
    """Decay of the moving sum of gradients."""


class LambConfig(ScheduledOptimizerConfig):
    """LAMB (arXiv:1904.00962): Adam whose step on each tensor is as long as the tensor's norm says. Not under ZeRO."""

    kind: Literal["lamb"] = "lamb"
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: Positive = 1e-6
    """Added to the root of the second moment."""


class LarsConfig(ScheduledOptimizerConfig):
    """LARS (arXiv:1708.03888): momentum whose step on each tensor follows the tensor's norm. Not under ZeRO."""

    kind: Literal["lars"] = "lars"
    momentum: Annotated[float, Field(gt=0, lt=1), NOT_A_SWITCH] = 0.9
    """Decay of the moving sum of gradients."""
    trust_coefficient: Positive = 0.001
    """Length of a step by the tensor's norm, at a learning rate of 1."""


def kind(raw: Any) -> Any:
    return raw.get("kind", "adamw") if isinstance(raw, Mapping) else getattr(raw, "kind", None)


OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[SGDConfig, Tag("sgd")]
    | Annotated[LambConfig, Tag("lamb")]
    | Annotated[LarsConfig, Tag("lars")],
    Discriminator(kind),
]
WHOLE_TENSORS = ("lamb", "lars")  # kinds that need the norm of every tensor, which ZeRO cuts into parts
