"""Changing what does not change the training of a run that has begun: stage, micro-batch, checkpoints, placement."""

import hashlib
from collections.abc import Sequence

from pipeline.config.plan import plan_batches
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import dump_config
from pipeline.preparation.write import write_deepspeed
from pipeline.run_directory import RunDirectory, write_atomic, write_json

CHANGEABLE = (
    "zero.stage",
    "micro_batch_size",
    "checkpoint.",
    "validation.",
    "profiling.",
    "guard.",
    "budget_gpu_hours",
    "data.max_damaged",
    "data.verify",
    "data.record",
)


def change_run(run: RunDirectory, overrides: Sequence[str], profile_text: str, placement: Placement) -> None:
    """Rewrite config, plan and profile for the next attempt, all or none. Order, global batch and length stay."""
    config, plan, settings = read_run_config(run.path), run.plan(), parse_overrides(overrides)
    if not isinstance(config, TrainingConfig):
        raise InputError(f"{run.path}: a run of stage {config.stage} has nothing that may change; start it anew")
    for key in settings:
        if not key.startswith(CHANGEABLE):
            raise InputError(
                f"--set {key}: would change the training; a resumed run may change zero.stage, micro_batch_size, "
                "checkpoint.*, validation.*, profiling.*, guard.*, budget_gpu_hours, data.max_damaged, data.verify, "
                "data.record and profile.*"
            )
    changed = validate(type(config), apply_overrides(config.model_dump(), settings), "--set")
    batches = plan_batches(changed.global_batch_size, changed.micro_batch_size, placement.world_size)
    precision = config.precision if placement.precision == "bf16" else "fp32"
    text = dump_config(changed)
    plan |= placement.as_plan() | {
        "precision": precision,
        "batches": batches._asdict(),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    write_json(run.plan_file, plan)
    write_deepspeed(run, changed, plan)
    write_atomic(run.profile_file, profile_text)
    write_atomic(run.config_file, text)
