"""What a run needs to know of the profile it runs under: how many processes, on what; and what follows for its plan."""

from dataclasses import dataclass
from typing import Any

from pipeline.config.plan import plan_batches
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError


@dataclass(frozen=True)
class Placement:
    """A resolved profile, as the pipeline sees it.

    Where a run may start on fewer nodes or more, `nodes_range` has the least and the most, and `nodes` is planned with.
    `here`: it speaks of this machine, which may be asked what it has. `accelerator_bytes`: memory of each accelerator,
    where the profile says so.
    """

    profile: str
    nodes: int
    ranks_per_node: int
    loader_workers: int
    accelerators_per_node: int
    nodes_range: tuple[int, int] | None = None
    here: bool = True
    accelerator_bytes: int | None = None

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

    def as_plan(self) -> dict[str, Any]:
        return {
            "nodes": self.nodes,
            "nodes_range": list(self.nodes_range or (self.nodes, self.nodes)),
            "ranks_per_node": self.ranks_per_node,
            "world_size": self.world_size,
            "loader_workers": self.loader_workers,
            "accelerators_per_node": self.accelerators_per_node,
        }

    def single(self) -> "Placement":
        """One process on the same machine."""
        return Placement(self.profile, 1, 1, self.loader_workers, min(1, self.accelerators_per_node), here=self.here,
                         accelerator_bytes=self.accelerator_bytes)  # fmt: skip


def placed(plan: dict[str, Any], config: Any, placement: Placement) -> dict[str, Any]:
    """The plan on another placement, with the same global batches. InputError where they do not divide."""
    if not isinstance(config, TrainingConfig):
        return plan | placement.as_plan()
    batches = plan_batches(config.global_batch_size, config.micro_batch_size, placement.world_size)
    return plan | placement.as_plan() | {
        "precision": placement.precision(config.precision),
        "compile_backend": placement.compile_backend(config.compile),
        "batches": batches._asdict(),
    }  # fmt: skip


def require_every_size(config: TrainingConfig, placement: Placement, least: int, most: int) -> None:
    """InputError, with the numbers of nodes that can, where one of `least` to `most` nodes cannot divide the batch.

    A run whose profile gives a range of nodes starts on as many as there are: each must do. To be called before
    submission.
    """
    per_node = config.micro_batch_size * placement.ranks_per_node
    can = [nodes for nodes in range(least, most + 1) if config.global_batch_size % (per_node * nodes) == 0]
    cannot = [nodes for nodes in range(least, most + 1) if nodes not in can]
    if cannot:
        raise InputError(
            f"profile.nodes {least}-{most}: global_batch_size {config.global_batch_size} does not divide over "
            f"{_in_words(cannot)} nodes of {placement.ranks_per_node} ranks with micro_batch_size "
            f"{config.micro_batch_size}; of this range {_in_words(can) if can else 'none'} can: set profile.nodes to a "
            "range of those, or change micro_batch_size"
        )


def _in_words(numbers: list[int]) -> str:
    """`2`, `2 and 4`, `2, 4 and 8`."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last
