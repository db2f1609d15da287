"""The DeepSpeed dictionary of our engine, for what is held against it."""

from typing import Any

from pipeline.config.deepspeed import deepspeed_config
from pipeline.config.plan import plan_batches
from pipeline.config.training import TrainingConfig


def our_deepspeed_config(config: TrainingConfig, *, world_size: int, parameters: int) -> dict[str, Any]:
    plan = plan_batches(config.global_batch_size, config.micro_batch_size, world_size)
    return deepspeed_config(config, plan, precision="fp32", parameters=parameters, cuda=False)
