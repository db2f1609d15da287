"""The DeepSpeed dictionary of a run: a pure function of config and plan, written to `deepspeed.json`. Never "auto"."""

from typing import Any

from pipeline.config.plan import BatchPlan
from pipeline.config.training import TrainingConfig

REDUCE_BUCKET_ELEMENTS = 25_000_000  # ViT-L (3.0e8) gets 12 buckets; DeepSpeed's own default of 5e8 gets one
STAGE_3_RESIDENT_ELEMENTS = 100_000  # parameters smaller than this (norms, biases) are not partitioned
SMALL_PARTITION_BYTES = 1 << 20
GRADIENT_BYTES = 4  # reduced in fp32 whatever they were computed in
LOSS_SCALE_FLOOR = 1
LOSS_SCALE_START_POWER = 16


def deepspeed_config(
    config: TrainingConfig, plan: BatchPlan, *, precision: str, parameters: int, cuda: bool
) -> dict[str, Any]:
    """`parameters`: those that are trained, on all ranks together."""
    dictionary = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": float(config.optimizer.max_grad_norm),  # always written: a missing key clips at 1.0
        "zero_optimization": _zero(config, plan, parameters, cuda),
        "bf16": {"enabled": precision == "bf16"},
        "fp16": _fp16(precision),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW everywhere: DeepSpeed's is compiled at run time
        "steps_per_print": 1_000_000_000,
    }
    if precision != "fp32":
        dictionary["communication_data_type"] = "fp32"
        if config.zero.stage >= 2:  # at stage 1 this key swaps in another optimizer class
            dictionary["data_types"] = {"grad_accum_dtype": "fp32"}
    return dictionary


def reduces_to_owners(parameters: int, world_size: int) -> bool:
    """Whether stages 1 and 2 reduce each part of a bucket to the rank that owns it, or all-reduce the whole bucket.

    To the owner moves each gradient once, 2 Psi a step with the gathered weights, as the ZeRO paper has it (section
    7.2.1); to all moves it twice, 3 Psi, in as few collectives as there are buckets. Owners cost about one collective
    more per rank: W latencies a step, against Psi bytes saved. So they win where a partition takes longer on the wire
    than a collective takes to start: at 20 us and 50 GB/s, 1 MiB. Computed, not measured; ViT-L keeps to its owners up
    to 1150 ranks, ViT-S up to 84.
    """
    return GRADIENT_BYTES * parameters >= SMALL_PARTITION_BYTES * world_size


def _zero(config: TrainingConfig, plan: BatchPlan, parameters: int, cuda: bool) -> dict[str, Any]:
    stage = config.zero.stage
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(REDUCE_BUCKET_ELEMENTS, parameters),  # its memory is taken whole
        "overlap_comm": cuda and stage == 3,
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = STAGE_3_RESIDENT_ELEMENTS
    else:
        zero["use_multi_rank_bucket_allreduce"] = not reduces_to_owners(parameters, plan.world_size)
    if config.zero.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return zero


def _fp16(precision: str) -> dict[str, Any]:
    if precision != "fp16":
        return {"enabled": False}
    return {
        "enabled": True,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": LOSS_SCALE_START_POWER,
        "loss_scale_window": 2000,  # steps without overflow before it doubles, as torch's GradScaler
        "hysteresis": 1,  # halves at the first overflow, as torch's GradScaler
        "min_loss_scale": LOSS_SCALE_FLOOR,
    }
