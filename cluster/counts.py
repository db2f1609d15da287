"""How many of something a profile asks for."""

from typing import Annotated

from pydantic import AfterValidator, Field


def _least_first(nodes: int | str) -> int | str:
    least, _, most = str(nodes).partition("-")
    if most and int(least) > int(most):
        raise ValueError(f"write the smaller number first: {most}-{least}")
    return nodes


Count = Annotated[int, Field(strict=True, ge=1)]
Nodes = Annotated[Count | Annotated[str, Field(pattern=r"^[1-9]\d*-[1-9]\d*$")], AfterValidator(_least_first)]
