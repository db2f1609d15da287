"""Profiles: where a recipe runs. World size stands here, never in a recipe."""

import glob
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PROFILES = Path(__file__).parent / "profiles"


class LocalProfile(BaseModel):
    """This machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["local"]
    """Where: `local` is this machine."""
    nodes: Literal[1] = 1
    """Machines; a local profile has one."""
    ranks_per_node: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Processes, each with one accelerator. None: one per accelerator, or two on a machine without."""
    loader_workers: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Processes per rank that decode images. None: the rank's share of the cores less one, at most 16."""
    accelerators_per_node: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Accelerators that are used. None: those this machine shows."""
    price_per_device_hour: Annotated[float, Field(ge=0)] = 0.0
    """Cost of an hour of one accelerator, or of a machine without; `vit plan` multiplies. 0: unknown."""
    env: dict[str, str] = {}
    """Environment variables of the job."""


def profile_names() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def profile_path(profile: str) -> Path:
    """The file of a shipped profile's name, or of a path that ends in .yaml; it may not exist."""
    return Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"


def accelerators_here() -> int:
    """NVIDIA devices of this machine that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [path for path in glob.glob("/dev/nvidia*") if path.removeprefix("/dev/nvidia").isdigit()]
    if visible is not None:
        return min(len(devices), len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
    return len(devices)


def resolved_profile(profile: LocalProfile) -> LocalProfile:
    """The profile with every None replaced by what this machine offers."""
    accelerators = profile.accelerators_per_node
    accelerators = accelerators_here() if accelerators is None else accelerators
    ranks = profile.ranks_per_node or accelerators or 2
    workers = profile.loader_workers
    if workers is None:
        workers = min(16, max(0, (os.cpu_count() or 1) // ranks - 1))
    chosen: dict[str, Any] = {
        "accelerators_per_node": min(accelerators, ranks) if accelerators else 0,
        "ranks_per_node": ranks,
        "loader_workers": workers,
    }
    return LocalProfile.model_validate(profile.model_dump() | chosen)
