"""Changing what does not change the training of a run that has begun: stage, micro-batch, checkpoints, placement."""

from collections.abc import Sequence

from pipeline.config.plan import plan_batches
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.config.stages import read_run_config
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import dump_config
from pipeline.run_directory import RunDirectory, write_atomic, write_json


def change_run(run: RunDirectory, overrides: Sequence[str], placement: Placement | None) -> None:
    """Rewrite config and plan for the next attempt. The global batch, the order and the length stay as they are."""
    config = read_run_config(run.path)
    settings = parse_overrides(overrides)
    changed = validate(type(config), apply_overrides(config.model_dump(), settings), "--set")
    plan = run.plan()
    if placement is not None:
        plan |= placement.as_plan() | {"precision": config.precision if placement.precision == "bf16" else "fp32"}
    plan["batches"] = plan_batches(changed.global_batch_size, changed.micro_batch_size, plan["world_size"])._asdict()
    write_json(run.plan_file, plan)
    write_atomic(run.config_file, dump_config(changed))
