"""What a run needs to know of the profile it runs under: how many processes, on what."""

from dataclasses import dataclass

from pipeline.errors import InputError


@dataclass(frozen=True)
class Placement:
    """A resolved profile, as the pipeline sees it.

    `nodes` is the most that a job gets and `least_nodes` the least, None where that is the same. `here`: it speaks of
    this machine, which may be asked what it has.
    """

    profile: str
    nodes: int
    ranks_per_node: int
    loader_workers: int
    accelerators_per_node: int
    least_nodes: int | None = None
    here: bool = True

    @property
    def nodes_range(self) -> tuple[int, int]:
        return self.least_nodes or self.nodes, self.nodes

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def precision(self, wanted: str) -> str:
        """The precision that a recipe's becomes here; InputError where it cannot be had."""
        if wanted == "fp16" and not self.accelerators_per_node:
            raise InputError("precision: fp16 needs an accelerator, and there is none here; set it to bf16 or fp32")
        return wanted if self.accelerators_per_node else "fp32"

    def compile_backend(self, wanted: bool) -> str | None:
        """What compiles the network here, by its name in torch.compile; None: nothing does."""
        return "inductor" if wanted and self.accelerators_per_node else None

    def as_plan(self) -> dict[str, int | list[int]]:
        return {
            "nodes": self.nodes,
            "nodes_range": list(self.nodes_range),
            "ranks_per_node": self.ranks_per_node,
            "world_size": self.world_size,
            "loader_workers": self.loader_workers,
            "accelerators_per_node": self.accelerators_per_node,
        }

    def single(self) -> "Placement":
        """One process on the same machine."""
        return Placement(self.profile, 1, 1, self.loader_workers, min(1, self.accelerators_per_node), here=self.here)
