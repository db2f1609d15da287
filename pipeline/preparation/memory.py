"""Whether a run fits the memory of its ranks, what is the lowest ZeRO stage that does, and what to change if none."""

import shutil
import subprocess
from typing import Any

import psutil

from models.config import SIZES
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import PreparedRun, planned_bytes
from pipeline.words import bytes_in_words

HEADROOM = 0.9  # share of an accelerator's memory that a run may plan with: its libraries and fragments need the rest
STAGES = range(4)


def available_bytes_per_rank(placement: Placement) -> int | None:
    """What a rank of this placement may hold; None where nobody here can say."""
    if not placement.accelerators_per_node:
        return psutil.virtual_memory().available // placement.ranks_per_node
    smallest = smallest_accelerator_bytes() if placement.profile == "local" else None
    return None if smallest is None else int(HEADROOM * smallest)


def smallest_accelerator_bytes() -> int | None:
    """Memory of this machine's smallest NVIDIA device, as its driver says; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(sizes) * 2**20 if done.returncode == 0 and sizes else None


def memory_shortage(prepared: PreparedRun, placement: Placement) -> str | None:
    """What is missing where the ranks' memory cannot hold the run, and the nearest settings that fit; else None."""
    available = available_bytes_per_rank(placement)
    need = needed_bytes(prepared, placement, prepared.config.zero.stage, prepared.config.micro_batch_size)
    if available is None or need <= available:
        return None
    return (
        f"{prepared.name}: {placement.ranks_per_node} ranks need about {bytes_in_words(need)} of memory each, "
        f"{bytes_in_words(available)} are free for each; {_what_fits(prepared, placement, available)}"
    )


def lowest_stage_that_fits(prepared: PreparedRun, placement: Placement) -> int | None:
    """The stage that exchanges least among those that fit; None where none does, or nobody can say."""
    available = available_bytes_per_rank(placement)
    if available is None:
        return None
    micro = prepared.config.micro_batch_size
    return next((stage for stage in STAGES if needed_bytes(prepared, placement, stage, micro) <= available), None)


def needed_bytes(prepared: PreparedRun, placement: Placement, stage: int, micro_batch_size: int) -> int:
    """Of one rank at its peak; on a machine without accelerators with the process and a checkpoint's copy."""
    plan = prepared.plan
    planned = planned_bytes(
        prepared.config, stage, micro_batch_size, plan["parameters"], placement, plan["precision"]
    )  # fmt: skip
    return planned if placement.accelerators_per_node else planned + plan["host_bytes_per_rank"]


def bytes_per_rank_on_host(plan: dict[str, Any], stage: int) -> int:
    """What a rank without an accelerator holds at its peak: process, training state, and a checkpoint's copy."""
    return plan["memory_bytes_per_rank"][f"stage {stage}"] + plan["host_bytes_per_rank"]


def _what_fits(prepared: PreparedRun, placement: Placement, available: int) -> str:
    """The nearest of: another stage, a smaller micro-batch, both, another encoder."""
    here, micro = prepared.config.zero.stage, prepared.config.micro_batch_size
    least = 2 if prepared.config.augmentation.mixes else 1
    smaller = [size for size in range(micro - 1, least - 1, -1) if micro % size == 0 and size % least == 0]

    def fits(stage: int, size: int) -> bool:
        return needed_bytes(prepared, placement, stage, size) <= available

    found = [f"zero.stage={stage}" for stage in STAGES if stage != here and fits(stage, micro)][:1]
    found += [f"micro_batch_size={size}" for size in smaller if fits(here, size)][:1]
    if not found:
        both = [(size, stage) for size in smaller for stage in STAGES if fits(stage, size)]
        found = [f"zero.stage={stage} with micro_batch_size={size}" for size, stage in both[:1]]
    return f"what fits: {', or '.join(found)}" if found else _encoder_that_fits(prepared, placement, available)


def _encoder_that_fits(prepared: PreparedRun, placement: Placement, available: int) -> str:
    """Memory follows the number of parameters closely enough to name a size."""
    patch, per_rank = (
        prepared.config.encoder.patch_size,
        needed_bytes(prepared, placement, prepared.config.zero.stage, prepared.config.micro_batch_size),
    )
    for letter, (_, width, depth, _, ratio) in reversed(SIZES.items()):
        share = (4 + 2 * ratio) * width**2 * depth / prepared.plan["parameters"]
        if share < 1 and share * per_rank < available:
            return f"the nearest that fits is encoder.name=vit_{letter}{patch}"
    return "no encoder fits; profile.ranks_per_node=1 needs less"
