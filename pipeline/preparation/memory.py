"""Whether the processes of a run fit this machine's memory, and which encoder does where they do not."""

import psutil

from models.config import SIZES
from pipeline.errors import InputError
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import PreparedRun

PROCESS_BYTES = 1_000_000_000  # torch, DeepSpeed and timm, resident in each rank before the model


def require_memory(prepared: PreparedRun, placement: Placement) -> None:
    """InputError where this machine's memory cannot hold the ranks, with the nearest encoder that fits.

    Accelerators' memory is not looked at here.
    """
    if placement.accelerators_per_node:
        return
    available = psutil.virtual_memory().available
    per_rank = prepared.plan["memory_bytes_per_rank"][f"stage {prepared.config.zero.stage}"]
    need = placement.ranks_per_node * (per_rank + PROCESS_BYTES)
    if need <= available:
        return
    raise InputError(
        f"{prepared.name}: {placement.ranks_per_node} ranks need about {need / 2**30:.1f} GiB of memory, "
        f"{available / 2**30:.1f} GiB are free; {_nearest_that_fits(prepared, per_rank, available, placement)}"
    )


def _nearest_that_fits(prepared: PreparedRun, per_rank: int, available: int, placement: Placement) -> str:
    """Memory follows the number of parameters closely enough to name a size."""
    patch = prepared.config.encoder.patch_size
    for letter, (_, width, depth, _, ratio) in reversed(SIZES.items()):
        share = (4 + 2 * ratio) * width**2 * depth / prepared.plan["parameters"]
        if share < 1 and placement.ranks_per_node * (share * per_rank + PROCESS_BYTES) < available:
            return f"the nearest that fits is encoder.name=vit_{letter}{patch}"
    return "no encoder fits; profile.ranks_per_node=1 needs less"
