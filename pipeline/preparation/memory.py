"""Whether a run fits the memory of its ranks, what is the lowest ZeRO stage that does, and what to change if none."""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, product
from types import MappingProxyType
from typing import Any

import psutil

from models.encoders.config import SIZES, EncoderConfig
from models.encoders.timm_config import TimmEncoderConfig
from pipeline.config.memory import checkpoint_bytes, rank_memory
from pipeline.config.optimizer import WHOLE_TENSORS
from pipeline.config.plan import plan_batches
from pipeline.config.training import TrainingConfig
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import PROCESS_BYTES, PreparedRun
from pipeline.words import bytes_in_words

HEADROOM = 0.9  # share of an accelerator's memory that a run may plan with: its libraries and fragments need the rest
STAGES = range(4)


def available_bytes_per_rank(placement: Placement) -> int | None:
    """What a rank of this placement may hold; None where nobody can say: of a cluster's nodes only a profile does."""
    if placement.accelerators_per_node and placement.accelerator_bytes is not None:
        return int(HEADROOM * placement.accelerator_bytes)
    if not placement.here:
        return None
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
    need = needed_bytes(prepared, placement)
    if available is None or need <= available:
        return None
    ranks = "1 rank needs" if placement.ranks_per_node == 1 else f"{placement.ranks_per_node} ranks need"
    return (
        f"{prepared.name}: {ranks} about {bytes_in_words(need)} of memory each, "
        f"{bytes_in_words(available)} are free for each; {_what_fits(prepared, placement, available)}"
    )


def lowest_stage_that_fits(prepared: PreparedRun, placement: Placement) -> int | None:
    """The stage that exchanges least among those that fit; None where none does, or nobody can say."""
    available = available_bytes_per_rank(placement)
    if available is None:
        return None
    possible = _possible_stages(prepared.config)
    return next((n for n in possible if needed_bytes(prepared, placement, {"zero.stage": n}) <= available), None)


def needed_bytes(prepared: PreparedRun, placement: Placement, changes: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Of one rank at its peak, with `changes` to the config by dotted key.

    On a machine without accelerators that is with the process, a checkpoint's copy and what was offloaded.
    """
    config, plan = changed(prepared.config, changes), prepared.plan
    batches = plan_batches(config.global_batch_size, config.micro_batch_size, placement.world_size)
    trained = plan["trained_parameters"]
    frozen = plan["parameters"] - trained
    memory = rank_memory(
        config, batches, trained, stage=config.zero.stage, precision=plan["precision"], frozen=frozen
    )  # fmt: skip
    if placement.accelerators_per_node:
        return memory.device
    return sum(memory) + PROCESS_BYTES + checkpoint_bytes(config, trained, frozen) // placement.world_size


def changed(config: TrainingConfig, changes: Mapping[str, Any]) -> TrainingConfig:
    """A copy with other values at dotted keys, for arithmetic: nothing is validated."""
    for key, value in changes.items():
        part, _, name = key.rpartition(".")
        update = {name: value} if not part else {part: getattr(config, part).model_copy(update={name: value})}
        config = config.model_copy(update=update)
    return config


def bytes_per_rank_on_host(plan: dict[str, Any], stage: int) -> int:
    """What a rank without an accelerator holds at its peak: process, training state, and a checkpoint's copy."""
    return plan["memory_bytes_per_rank"][f"stage {stage}"] + plan["host_bytes_per_rank"]


def _what_fits(prepared: PreparedRun, placement: Placement, available: int) -> str:
    """The nearest of one setting, or else of several at once, the cheapest in time first; else another encoder."""
    fitting = (
        changes
        for changes in _changes(prepared.config)
        if needed_bytes(prepared, placement, changes) <= available
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    for changes in fitting:
        if found and len(changes) > len(found[0]):
            break
        if changes.keys() not in [other.keys() for other in found]:
            found.append(changes)
    if not found:
        return _encoder_that_fits(prepared, placement, available)
    return f"what fits: {', or '.join(_words(changes) for changes in found)}"


def _changes(config: TrainingConfig) -> list[dict[str, Any]]:
    """What may be changed for less memory, the fewest settings first."""
    micro, least = config.micro_batch_size, 2 if config.augmentation.mixes else 1
    options = {
        "zero.stage": [stage for stage in _possible_stages(config) if stage > config.zero.stage],
        "micro_batch_size": [n for n in range(micro - 1, least - 1, -1) if micro % n == 0 and n % least == 0],
        "activation_checkpointing": [] if config.activation_checkpointing or config.tuning.kind == "head" else [True],
        "zero.offload_optimizer": [] if config.zero.offload_optimizer == "cpu" or not config.zero.stage else ["cpu"],
    }
    return [
        dict(zip(keys, values, strict=True))
        for count in range(1, len(options) + 1)
        for keys in combinations(options, count)
        for values in product(*(options[key] for key in keys))
    ]


def _possible_stages(config: TrainingConfig) -> list[int]:
    """At which the optimizer, the tuning and the objective can train."""
    stages = STAGES[:1] if config.optimizer.kind in WHOLE_TENSORS or config.tuning.whole_tensors else STAGES
    return [stage for stage in stages if config.objective.problem(config.encoder, stage) is None]


def _words(changes: Mapping[str, Any]) -> str:
    first, *others = (f"{key}={str(value).lower()}" for key, value in changes.items())
    return f"{first} with {' and '.join(others)}" if others else first


def _encoder_that_fits(prepared: PreparedRun, placement: Placement, available: int) -> str:
    """The largest smaller one, with all else as it is."""
    config = prepared.config
    if isinstance(config.encoder, TimmEncoderConfig):
        return f"a smaller network than {config.encoder.name}, or smaller images, may"
    own, of_size = config.encoder, {"name", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"}
    kept = own.model_dump(exclude=of_size)
    beside_blocks = prepared.plan["parameters"] - _block_parameters(own)  # as many, or fewer, in a smaller one
    for letter in reversed(SIZES):
        name = f"vit_{letter}{own.patch_size}"
        encoder = EncoderConfig.model_validate({"name": name} | kept)
        parameters = beside_blocks + _block_parameters(encoder)
        trained = prepared.plan["trained_parameters"] if config.tuning.freezes else parameters  # or fewer
        smaller = replace(prepared, plan=prepared.plan | {"parameters": parameters, "trained_parameters": trained})
        fits = needed_bytes(smaller, placement, {"encoder": encoder}) <= available
        if parameters < prepared.plan["parameters"] and fits:
            return f"the nearest that fits is encoder.name={name}"
    return "no encoder fits; profile.ranks_per_node=1 needs less"


def _block_parameters(encoder: EncoderConfig) -> int:
    """Of the matrices in an encoder's blocks: attention's four, and the MLP's two."""
    return int((4 + 2 * encoder.mlp_ratio) * encoder.embed_dim**2) * encoder.depth
