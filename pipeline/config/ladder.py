"""What a rehearsal ladder is made of: `vit ladder --set ladder.KEY=VALUE`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from models.schema import NOT_A_SWITCH, Config, Positive
from pipeline.config.protocols import Protocol

Fraction = Annotated[float, Field(gt=0, le=1), NOT_A_SWITCH]
RungSize = Literal["ti", "s", "b", "l", "half", "own"]
OF_FEATURES = ("linear-cached-v1", "knn-20-v1")  # protocols that a rung may be scored by


class LadderConfig(Config):
    """The small runs that come before a large one."""

    sizes: Annotated[tuple[RungSize, ...], Field(min_length=1)] | None = None
    """Encoders: ti, s, b, l are the sizes of those names, `own` the recipe's, `half` with half its heads; none larger
    than the recipe's. None: ti and s, or where the recipe's is no larger than s: half and own."""
    fractions: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.1, 0.2, 0.4)
    """Slices of the data, as shares of each class; a smaller one lies within a larger one. Each is read for as many
    epochs as the full run reads its data."""
    budget_hours: Positive | None = None
    """What the ladder may take by its plan; the dearest rungs are left out until it does. None: a tenth of the full
    run, and an hour at least."""
    protocol: Protocol = "linear-cached-v1"
    """How a rung is scored that learned without labels, on the validation split of labelled data: linear-cached-v1 or
    knn-20-v1. A supervised one is scored by its own head."""

    @field_validator("sizes", "fractions")
    @classmethod
    def _each_once(cls, values: tuple | None) -> tuple | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError(f"each is named once (got {list(values)})")
        return values

    @field_validator("protocol")
    @classmethod
    def _of_features(cls, protocol: str) -> str:
        if protocol not in OF_FEATURES:
            raise ValueError(f"{protocol} is no protocol of frozen features; say {' or '.join(OF_FEATURES)}")
        return protocol
