"""Whether the processes of a run fit this machine's memory, and which encoder does where they do not."""

from typing import Any

import psutil

from models.config import SIZES
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import PreparedRun


def memory_shortage(prepared: PreparedRun, placement: Placement) -> str | None:
    """What is missing where this machine's memory cannot hold the ranks, and the nearest encoder that fits; else None.

    Accelerators' memory is not looked at here.
    """
    if placement.accelerators_per_node:
        return None
    available = psutil.virtual_memory().available
    per_rank = bytes_per_rank_on_host(prepared.plan, prepared.config.zero.stage)
    need = placement.ranks_per_node * per_rank
    if need <= available:
        return None
    return (
        f"{prepared.name}: {placement.ranks_per_node} ranks need about {need / 2**30:.1f} GiB of memory, "
        f"{available / 2**30:.1f} GiB are free; {_nearest_that_fits(prepared, per_rank, available, placement)}"
    )


def bytes_per_rank_on_host(plan: dict[str, Any], stage: int) -> int:
    """What a rank without an accelerator holds at its peak: process, training state, and a checkpoint's copy."""
    return plan["memory_bytes_per_rank"][f"stage {stage}"] + plan["host_bytes_per_rank"]


def _nearest_that_fits(prepared: PreparedRun, per_rank: int, available: int, placement: Placement) -> str:
    """Memory follows the number of parameters closely enough to name a size."""
    patch = prepared.config.encoder.patch_size
    for letter, (_, width, depth, _, ratio) in reversed(SIZES.items()):
        share = (4 + 2 * ratio) * width**2 * depth / prepared.plan["parameters"]
        if share < 1 and placement.ranks_per_node * share * per_rank < available:
            return f"the nearest that fits is encoder.name=vit_{letter}{patch}"
    return "no encoder fits; profile.ranks_per_node=1 needs less"
