"""Profiles: where a recipe runs. World size stands here, never in a recipe."""

import glob
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from cluster.counts import Count
from cluster.kubernetes.profile import KubernetesProfile
from cluster.slurm.profile import SlurmProfile

PROFILES = Path(__file__).parent / "profiles"
ProfileT = TypeVar("ProfileT", "LocalProfile", SlurmProfile, KubernetesProfile)


class LocalProfile(BaseModel):
    """This machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["local"]
    """Where: `local` is this machine."""
    nodes: Literal[1] = 1
    """Machines; a local profile has one."""
    ranks_per_node: Count | None = None
    """Processes, each with one accelerator. None: one per accelerator, or two on a machine without."""
    loader_workers: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Processes per rank that decode images. None: the rank's share of the cores less one, at most 16."""
    accelerators_per_node: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Accelerators that are used. None: those this machine shows."""
    price_per_device_hour: Annotated[float, Field(ge=0)] = 0.0
    """Cost of an hour of one accelerator, or of a machine without; `vit plan` multiplies. 0: unknown."""
    env: dict[str, str] = {}
    """Environment variables of the job."""


Profile = Annotated[LocalProfile | SlurmProfile | KubernetesProfile, Field(discriminator="kind")]


def profile_class(kind: Any) -> type[LocalProfile] | type[SlurmProfile] | type[KubernetesProfile]:
    """The config class of a profile's `kind`; ValueError in one line where there is none."""
    match kind:
        case "local":
            return LocalProfile
        case "slurm":
            return SlurmProfile
        case "kubernetes":
            return KubernetesProfile
        case None:
            raise ValueError("kind: missing; a profile says where it runs: `kind: local`, `slurm` or `kubernetes`")
        case _:
            raise ValueError(f"kind: `{kind}` is not a place that runs jobs; use local, slurm or kubernetes")


def nodes_range(profile: LocalProfile | SlurmProfile | KubernetesProfile) -> tuple[int, int]:
    """Least and most machines that a job of this profile runs on."""
    least, _, most = str(profile.nodes).partition("-")
    return int(least), int(most or least)


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


def resolved_profile(profile: ProfileT) -> ProfileT:
    """The profile with each None of processes replaced: by what this machine offers, or a cluster is asked for."""
    match profile:
        case LocalProfile():
            chosen = _of_this_machine(profile)
        case SlurmProfile():
            chosen = _of_a_cluster(profile, profile.cpus_per_task)
        case KubernetesProfile():
            chosen = _of_a_cluster(profile, profile.cpus)
    return type(profile).model_validate(profile.model_dump() | chosen)


def _of_this_machine(profile: LocalProfile) -> dict[str, Any]:
    accelerators = profile.accelerators_per_node
    accelerators = accelerators_here() if accelerators is None else accelerators
    ranks = profile.ranks_per_node or accelerators or 2
    workers = profile.loader_workers
    if workers is None:
        workers = min(16, max(0, (os.cpu_count() or 1) // ranks - 1))
    return {
        "accelerators_per_node": min(accelerators, ranks) if accelerators else 0,
        "ranks_per_node": ranks,
        "loader_workers": workers,
    }


def _of_a_cluster(profile: SlurmProfile | KubernetesProfile, cores: int | None) -> dict[str, Any]:
    """Of the machine that submits nothing is taken: it is not the one that runs."""
    ranks = profile.ranks_per_node or profile.accelerators_per_node or 1
    workers = profile.loader_workers
    if workers is None and cores is not None:
        workers = min(16, max(0, cores // ranks - 1))
    elif workers is None:
        workers = 8 if profile.accelerators_per_node else 1
    return {"ranks_per_node": ranks, "loader_workers": workers}
