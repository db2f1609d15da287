"""What a run needs to know of the profile it runs under: how many processes, on what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """A resolved profile, as the pipeline sees it."""

    profile: str
    nodes: int
    ranks_per_node: int
    loader_workers: int
    accelerators_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def precision(self) -> str:
        """The precision a recipe's bf16 becomes here."""
        return "bf16" if self.accelerators_per_node else "fp32"

    def as_plan(self) -> dict[str, int]:
        return {
            "nodes": self.nodes,
            "ranks_per_node": self.ranks_per_node,
            "world_size": self.world_size,
            "loader_workers": self.loader_workers,
            "accelerators_per_node": self.accelerators_per_node,
        }

    def single(self) -> "Placement":
        """One process on the same machine."""
        return Placement(self.profile, 1, 1, self.loader_workers, min(1, self.accelerators_per_node))
