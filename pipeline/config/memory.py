"""Memory of a rank, counted before anything is allocated. Pure, torch-free."""

from typing import NamedTuple

from models.encoders.timm_config import TimmEncoderConfig
from models.tuning.size import new_tokens
from pipeline.config.deepspeed import REDUCE_BUCKET_ELEMENTS
from pipeline.config.optimizer import OptimizerConfig
from pipeline.config.plan import BatchPlan
from pipeline.config.timm_size import timm_size
from pipeline.config.training import TrainingConfig

GATHERED_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: so many stay whole until they are updated
PREFETCHED_ELEMENTS = 50_000_000  # DeepSpeed's stage3_prefetch_bucket_size
WIDEST_GRADIENT = 8  # bytes by width and token: of an MLP's hidden layer, of two-byte numbers
ACTIVATIONS_PER_TOKEN = 34  # bytes by width and block, of two-byte numbers (arXiv:2205.05198, equation 2)


class RankMemory(NamedTuple):
    """Most bytes that the tensors of one rank take."""

    device: int
    host: int  # of an optimizer that was offloaded, and of the frozen weights that rank 0 keeps for checkpoints


def rank_memory(
    config: TrainingConfig, batches: BatchPlan, parameters: int, *, stage: int, precision: str, frozen: int = 0
) -> RankMemory:
    """Of a run under a ZeRO `stage`, whatever the config says; the batch plan is that of this placement.

    `parameters` are those that train, `frozen` those beside them that do not.

    A step is at its peak in forward and backward: the fused optimizer makes no copies. Counted against the tensors of
    real steps under DeepSpeed 0.19.8, within 15 %.
    """
    activations = activation_bytes(config, batches.micro_batch_size, precision)
    world, accumulates = batches.world_size, batches.gradient_accumulation_steps > 1
    state = (4 + moment_bytes(config.optimizer) + 4 * config.keeps_average) * parameters
    compute = 4 if precision == "fp32" else 2
    teacher = compute * _teacher_parameters(config) + _frozen_bytes(config, frozen, world, stage, compute)
    copied = 4 * frozen
    if stage == 0:
        return RankMemory(teacher + _replicated(state, parameters, activations, world, accumulates, precision), copied)
    own = state // world
    if stage == 3:
        peak = _partitioned_weights(parameters, activations, world, compute)
    else:
        peak = _partitioned_state(stage, parameters, activations, world, accumulates, compute)
    if config.zero.offload_optimizer == "none":
        return RankMemory(teacher + peak + own, copied)
    return RankMemory(teacher + peak, copied + own + 4 * parameters // world)  # with the gradients it updates by


def _teacher_parameters(config: TrainingConfig) -> int:
    """Of a network beside the one that learns; no objective that any network of timm learns by has one of its own."""
    if isinstance(config.encoder, TimmEncoderConfig):
        return 0
    return config.objective.size(config.encoder, num_classes=0).teacher_parameters


def _frozen_bytes(config: TrainingConfig, frozen: int, world: int, stage: int, compute: int) -> int:
    """Weights that no gradient changes: in fp32 and cast by autocast without ZeRO, in the compute dtype with it.

    Stage 3 gathers them by way of a second buffer, which is at the peak where no activations are kept.
    """
    if stage == 0:
        return (4 if compute == 4 else 4 + compute) * frozen
    if stage == 3:
        buffer = min(frozen, PREFETCHED_ELEMENTS) if config.tuning.kind == "head" else 0
        return compute * (frozen // world + min(frozen, GATHERED_ELEMENTS) + buffer)
    return compute * frozen


def _replicated(
    state: int, parameters: int, activations: int, world: int, accumulates: bool, precision: str
) -> int:  # fmt: skip
    """Plain data parallel. Its buckets are the gradients, and stay; what is accumulated lies beside them."""
    gradients = 4 * parameters
    casts = 0 if precision == "fp32" else 2 * parameters  # of autocast, from forward to backward
    if world > 1:
        return state + gradients + activations + casts + gradients * accumulates
    return state + (gradients + activations if accumulates else max(gradients, activations)) + casts


def _partitioned_state(
    stage: int, parameters: int, activations: int, world: int, accumulates: bool, compute: int
) -> int:
    """Stages 1 and 2 without the optimizer's share: compute weights, gradients and the bucket that reduces them.

    Stage 1 keeps whole gradients in the compute dtype, stage 2 its own in fp32. What is no fp32 is reduced as such.
    """
    bucket = min(REDUCE_BUCKET_ELEMENTS, parameters)
    cast = 0 if compute == 4 else 4 * bucket // (world if stage == 1 else 1)
    gradients = compute * parameters if stage == 1 else 4 * parameters // world
    kept = compute * (parameters + bucket)
    return kept + (gradients + max(activations, cast) if accumulates else max(activations, gradients + cast))


def _partitioned_weights(parameters: int, activations: int, world: int, compute: int) -> int:
    """Stage 3 without the optimizer's share: its gradients in fp32, their bucket, and the weights gathered to compute.

    They are gathered by way of a second buffer; gradients are reduced in fp32, a bucket of them at a time.
    """
    bucket = min(REDUCE_BUCKET_ELEMENTS, parameters)
    gathered = compute * min(parameters, GATHERED_ELEMENTS)
    forward = activations + compute * min(parameters, PREFETCHED_ELEMENTS)
    backward = (compute + (0 if compute == 4 else 4)) * bucket
    return (compute + 4) * parameters // world + 4 * bucket + gathered + max(forward, backward)


def activation_bytes(config: TrainingConfig, micro_batch_size: int, precision: str) -> int:
    """Bytes kept for backward; with activation checkpointing the inputs of all blocks, and one block in backward."""
    size = 4 if precision == "fp32" else 2
    if isinstance(config.encoder, TimmEncoderConfig):  # recomputing saves some of it; how much, nobody has counted
        return micro_batch_size * size * int(timm_size(config.encoder, config.objective)["kept"])
    objective = config.objective.size(config.encoder, num_classes=0)  # a head's scores are too few to count
    parts = [stack._replace(tokens=stack.tokens + new_tokens(config.tuning)) for stack in objective.stacks]
    if config.tuning.kind == "head":  # kept for no backward: one block after the other
        parts = [stack._replace(depth=1) for stack in parts]
    of_block = ACTIVATIONS_PER_TOKEN * size // 2
    if config.encoder.dropout:  # what was dropped: behind attention and the MLP, and inside it
        of_block += round(size * (2 + config.encoder.mlp_ratio))
    if config.activation_checkpointing:
        whole_block = max(count * width * (of_block + WIDEST_GRADIENT * size // 2) for count, width, _ in parts)
        return micro_batch_size * (whole_block + sum(size * count * width * depth for count, width, depth in parts))
    of_blocks = sum(count * width * depth * of_block for count, width, depth in parts)
    return micro_batch_size * (of_blocks + objective.loss_bytes)


def moment_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes per parameter that the optimizer keeps beside the weights."""
    return 4 if optimizer.kind in ("sgd", "lars") else 8


def checkpoint_bytes(config: TrainingConfig, parameters: int, frozen: int = 0) -> int:
    """Bytes of one checkpoint: fp32 weight, moments and average of what trains, and the `frozen` weights."""
    return (4 + moment_bytes(config.optimizer) + 4 * config.keeps_average) * parameters + 4 * frozen
