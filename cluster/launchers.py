"""The launcher of a profile: the only place where a `kind` becomes a class."""

from collections.abc import Mapping
from typing import Any

from cluster.job import Launcher
from cluster.kubernetes.launcher import KubernetesLauncher
from cluster.kubernetes.profile import KubernetesProfile
from cluster.local import LocalLauncher
from cluster.profile import SlurmProfile
from cluster.slurm.launcher import SlurmLauncher


def launcher_for(kind: str, profile: Mapping[str, Any]) -> Launcher:
    """What runs jobs where this profile says. `profile` is the content of RUN/profile.yaml."""
    match kind:
        case "local":
            return LocalLauncher()
        case "slurm":
            return SlurmLauncher(SlurmProfile.model_validate(profile))
        case "kubernetes":
            return KubernetesLauncher(KubernetesProfile.model_validate(profile))
        case _:
            raise ValueError(f"profile.kind: `{kind}` is not a place that runs jobs; use local, slurm or kubernetes")
