"""Changing what does not change the training of a run that has begun: stage, micro-batch, checkpoints, placement."""

import hashlib
import logging
import shutil
from collections.abc import Iterable, Sequence

from pipeline.checkpoints.identity import CHANGEABLE
from pipeline.config.plan import StepPlan, plan_steps, require_traced_steps
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.config.stages import read_run_config
from pipeline.config.training import LENGTH_UNITS, TrainingConfig
from pipeline.errors import InputError
from pipeline.loading.sources import open_sources
from pipeline.preparation.health import with_health
from pipeline.preparation.placement import Placement, placed, require_every_size
from pipeline.preparation.preflight import require_mirror, require_writable
from pipeline.preparation.training import dump_config, with_validation
from pipeline.preparation.write import write_deepspeed
from pipeline.redaction import require_no_secret
from pipeline.registry.writers import require_packages
from pipeline.run_directory import RunDirectory, write_atomic, write_json

log = logging.getLogger(__name__)


def change_run(run: RunDirectory, overrides: Sequence[str], profile_text: str, placement: Placement) -> None:
    """Rewrite config, plan and profile for the next attempt, all or none. Order and global batch stay.

    So does the length, but for a run at a constant rate, which may be made longer: one that has begun to cool down goes
    back to its newest checkpoint from before, and those since are set aside as `step-N.cooled`.
    A run that has ended, and is not made longer, is left as it is.
    """
    config, plan, settings = read_run_config(run.path), run.plan(), parse_overrides(overrides)
    if not isinstance(config, TrainingConfig):
        raise InputError(f"{run.path}: a run of stage {config.stage} has nothing that may change; start it anew")
    _require_changeable(config, settings)
    changed = validate(type(config), apply_overrides(config.model_dump(), settings), "--set", settings.keys())
    require_packages(changed.writers)
    if any(key.startswith("validation") for key in settings):
        changed = with_validation(changed, open_sources(changed.data), plan["samples_per_epoch"], "--set")
    if any(key.startswith("health") for key in settings):
        changed = with_health(changed, open_sources(changed.data), plan["samples_per_epoch"], "--set")
    if "health.every_steps" in settings:
        plan["health_asked"] = settings["health.every_steps"]
    is_longer = changed.length != config.length or changed.optimizer != config.optimizer
    if run.result_file.is_file() and not is_longer:
        return
    if placement.nodes_range is not None:
        require_every_size(changed, placement, *placement.nodes_range)
    plan = placed(plan, changed, placement)
    require_writable(run)
    if changed.checkpoint.mirror != config.checkpoint.mirror:
        require_mirror(run, changed.checkpoint.mirror)
    text = dump_config(changed)
    require_no_secret(str(run.config_file), text)
    plan |= {"config_sha256": hashlib.sha256(text.encode()).hexdigest()}
    steps = before = StepPlan(**plan["steps"])
    if is_longer:
        steps = _longer(changed, plan)
    if any(key.startswith("profiling") for key in settings):
        newest = run.newest_checkpoint()
        require_traced_steps(changed, steps, newest.step if newest else 0)
    if is_longer:
        _go_back_to_constant_rate(run, min(before.cooldown_begins, steps.cooldown_begins))
        plan["steps"] = steps._asdict()
        run.result_file.unlink(missing_ok=True)  # a run that had ended goes on
    write_json(run.plan_file, plan)
    write_deepspeed(run, changed, plan)
    write_atomic(run.profile_file, profile_text)
    write_atomic(run.config_file, text)


def _longer(changed: TrainingConfig, plan: dict) -> StepPlan:
    steps, planned = plan_steps(changed, plan["samples_per_epoch"]), plan["steps"]["steps"]
    if steps.steps < planned:
        raise InputError(
            f"--set {changed.length[0]}: {steps.steps} steps, and this run was planned for {planned}; "
            "it can be made longer, not shorter"
        )
    return steps


def _require_changeable(config: TrainingConfig, keys: Iterable[str]) -> None:
    for key in keys:
        if key in LENGTH_UNITS or key == "optimizer.cooldown":
            _require_extensible(config, key)
        elif not key.startswith(CHANGEABLE):
            raise InputError(
                f"--set {key}: would change the training; a resumed run may change zero.*, compile, "
                "activation_checkpointing, micro_batch_size, checkpoint.*, validation.*, health.*, profiling.*, "
                "guard.*, budget_gpu_hours, writers, data.max_damaged, data.verify, data.record and profile.*"
            )


def _require_extensible(config: TrainingConfig, key: str) -> None:
    schedule, (own_unit, _) = config.optimizer.schedule, config.length
    if schedule != "constant":
        raise InputError(
            f"--set {key}: optimizer.schedule `{schedule}` falls to its end over the length it began with; only a run "
            "at a constant rate can be made longer: start a new one with initialise_from"
        )
    if key in LENGTH_UNITS and key != own_unit:
        raise InputError(f"--set {key}: the length of this run was given in {own_unit}; extend it in that unit")


def _go_back_to_constant_rate(run: RunDirectory, last_step: int) -> None:
    """Set aside the checkpoints after `last_step`, which have seen a lower rate; InputError where none is left."""
    committed = run.committed_checkpoints()
    cooled = [one for one in committed if one.step > last_step]
    if not cooled:
        return
    if len(cooled) == len(committed):
        raise InputError(
            f"{run.checkpoints}: the rate begins to fall after step {last_step}, and the oldest checkpoint is of step "
            f"{cooled[-1].step}: there is none to make the run longer from; start a new one with initialise_from"
        )
    for checkpoint in cooled:
        aside = checkpoint.directory.with_name(f"{checkpoint.directory.name}.cooled")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.directory.rename(aside)
        log.warning("the run is made longer from step %d: %s is set aside", committed[len(cooled)].step, aside)
