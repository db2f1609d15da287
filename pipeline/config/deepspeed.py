"""The DeepSpeed dictionary of a run: a pure function of config and plan, written to `deepspeed.json`. Never "auto"."""

from typing import Any

from pipeline.config.plan import BatchPlan

REDUCE_BUCKET_ELEMENTS = 25_000_000  # ViT-L (3.0e8) gets 12 buckets; DeepSpeed's own default of 5e8 gets one
STAGE_3_RESIDENT_ELEMENTS = 100_000  # parameters smaller than this (norms, biases) are not partitioned


def deepspeed_config(
    plan: BatchPlan, stage: int, *, precision: str, max_grad_norm: float, cuda: bool
) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "overlap_comm": cuda and stage == 3,
        # One collective per bucket and rank: 1x the gradients instead of 2x (arXiv:1910.02054, section 7).
        "use_multi_rank_bucket_allreduce": False,
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = STAGE_3_RESIDENT_ELEMENTS
    config = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "gradient_clipping": float(max_grad_norm),  # always written: a missing key clips at 1.0
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    if precision == "bf16":
        config["communication_data_type"] = "fp32"
        if stage >= 2:  # at stage 1 this key swaps in another optimizer class
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
