"""The schema base of every config: frozen, no unknown keys, each field documented by the string under it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(strict=True, ge=1)]  # refuses True, "4" and 4.0, which YAML slips in
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Config(BaseModel):
    """Frozen after validation; a derived value belongs in a plan, never in a config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
