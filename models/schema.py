"""What every config is built from: a frozen base without unknown keys, and the numbers its fields hold.

A number is finite and at most 10^12, and a size at most 10^6, so that no product of the two overflows 63 bits.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MOST = 10**12


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads `on` and `yes` as true, and pydantic reads true as 1.0
        raise PydanticCustomError("switch", "a switch is no number")
    return value


NOT_A_SWITCH = BeforeValidator(_no_switch)
Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]  # refuses True, "4" and 4.0, which YAML slips in
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=MOST)]
Size = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]  # of a batch, an image, a network
Positive = Annotated[float, Field(gt=0, le=MOST), NOT_A_SWITCH]
NonNegative = Annotated[float, Field(ge=0, le=MOST), NOT_A_SWITCH]
Number = Annotated[float, Field(ge=-MOST, le=MOST), NOT_A_SWITCH]
Fraction = Annotated[float, Field(ge=0, le=1), NOT_A_SWITCH]
Share = Annotated[float, Field(gt=0, le=1), NOT_A_SWITCH]  # a fraction that is not nothing
Rate = Annotated[float, Field(ge=0, lt=1), NOT_A_SWITCH]  # a fraction that is not all
Text = Annotated[str, Field(min_length=1)]


class Config(BaseModel):
    """Frozen after validation, each field documented by the string under it; a derived value belongs in a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
