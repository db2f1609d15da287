"""What follows from a config, a dataset's size and a world: batches, steps and arithmetic. Pure, torch-free."""

from typing import NamedTuple

from models.encoders.config import EncoderConfig
from models.encoders.timm_config import TimmEncoderConfig
from models.objectives.config import ObjectiveConfig
from pipeline.config.timm_size import timm_size
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError


class BatchPlan(NamedTuple):
    """How one optimizer step is split over ranks and micro-steps. Counts are images."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    gradient_accumulation_steps: int


def plan_batches(global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchPlan:
    per_micro_step = micro_batch_size * world_size
    accumulation, remainder = divmod(global_batch_size, per_micro_step)
    if remainder or accumulation == 0:
        below = max(1, global_batch_size // per_micro_step) * per_micro_step
        raise InputError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size x world size = "
            f"{micro_batch_size} x {world_size} = {per_micro_step}; "
            f"nearest that are: {below} and {below + per_micro_step}, or change micro_batch_size"
        )
    return BatchPlan(global_batch_size, micro_batch_size, world_size, accumulation)


class StepPlan(NamedTuple):
    """Length of a run. The learning rate reaches its peak after `warmup_samples`; a constant one then falls over the
    last `cooldown_samples`."""

    samples: int
    steps: int
    warmup_samples: int
    cooldown_samples: int = 0

    @property
    def cooldown_begins(self) -> int:
        """The step after which a constant rate falls; the last where it does not."""
        return (self.samples - self.cooldown_samples) * self.steps // self.samples


def plan_steps(config: TrainingConfig, samples_per_epoch: int) -> StepPlan:
    unit, amount = config.length
    in_samples = {"epochs": samples_per_epoch, "steps": config.global_batch_size, "samples": 1}[unit]
    steps = max(1, -(-round(amount * in_samples) // config.global_batch_size))
    samples = steps * config.global_batch_size
    warmup, cooldown = round(config.optimizer.warmup * in_samples), round(config.optimizer.cooldown * in_samples)
    if warmup > samples - (config.optimizer.schedule != "constant"):  # the others are at their end at the last step
        raise InputError(
            f"optimizer.warmup {config.optimizer.warmup:g}: the run's {amount:g} {unit} end before the learning rate "
            "reaches its peak; shorten it"
        )
    if warmup + cooldown > samples:
        raise InputError(
            f"optimizer.cooldown {config.optimizer.cooldown:g} and warmup {config.optimizer.warmup:g} are longer than "
            f"the run's {amount:g} {unit}; shorten them"
        )
    plan = StepPlan(samples, steps, warmup, cooldown)
    require_traced_steps(config, plan)
    return plan


def require_traced_steps(config: TrainingConfig, plan: StepPlan, first_step: int = 0) -> None:
    """InputError where a run that goes on from `first_step` makes none of the steps that are to be traced."""
    first, last = config.profiling.steps or (1, plan.steps)
    if first > plan.steps or last <= first_step:
        begins = f"goes on from step {first_step} and " if first_step else ""
        raise InputError(f"profiling.steps [{first}, {last}]: the run {begins}ends at step {plan.steps}; say others")


def count_parameters(
    encoder: EncoderConfig | TimmEncoderConfig, objective: ObjectiveConfig, num_classes: int
) -> int:  # fmt: skip
    """Parameters of the training module: encoder, and head or decoder. Of a network of timm's, another process says."""
    if isinstance(encoder, TimmEncoderConfig):
        size = timm_size(encoder, objective)
        return int(size["parameters"] + num_classes * size["parameters_per_class"])
    return objective.size(encoder, num_classes).parameters


def training_flops(
    encoder: EncoderConfig | TimmEncoderConfig, objective: ObjectiveConfig, num_classes: int
) -> float:  # fmt: skip
    """Floating-point operations per training image: forward 1, backward 2; matrix products only, 2 per multiply-add."""
    if isinstance(encoder, TimmEncoderConfig):
        size = timm_size(encoder, objective)
        return size["flops"] + num_classes * size["flops_per_class"]
    size = objective.size(encoder, num_classes)
    return 6.0 * size.macs + 2.0 * size.teacher_macs
