"""What follows from a config, a dataset's size and a world: batches, steps and arithmetic. Pure, torch-free."""

from typing import NamedTuple

from models.encoders.config import EncoderConfig
from models.encoders.size import encoder_macs, encoder_parameters, fixed_parameters
from models.encoders.timm_config import TimmEncoderConfig
from models.objectives.config import ObjectiveConfig
from models.tuning.config import FullTuning, TuningConfig
from models.tuning.size import new_constants, new_macs, new_parameters
from pipeline.config.timm_size import timm_size
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError

FULL = FullTuning()


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
    encoder: EncoderConfig | TimmEncoderConfig, objective: ObjectiveConfig, num_classes: int,
    tuning: TuningConfig = FULL,
) -> int:  # fmt: skip
    """Parameters of the training module: encoder, what tuning adds, and head or decoder.

    Of a network of timm's, another process says.
    """
    if isinstance(encoder, TimmEncoderConfig):
        size = timm_size(encoder, objective)
        return int(size["parameters"] + num_classes * size["parameters_per_class"])
    added = new_parameters(tuning, encoder) + new_constants(tuning, encoder)
    return objective.size(encoder, num_classes).parameters + added


def count_trained(
    encoder: EncoderConfig | TimmEncoderConfig, objective: ObjectiveConfig, num_classes: int,
    tuning: TuningConfig = FULL,
) -> int:  # fmt: skip
    """Those of them that train: of all without tuning, but for fixed tables of positions."""
    if isinstance(encoder, TimmEncoderConfig):
        if not tuning.freezes:
            return count_parameters(encoder, objective, num_classes)
        return int(num_classes * timm_size(encoder, objective)["parameters_per_class"])
    if not tuning.freezes:
        size = objective.size(encoder, num_classes)
        return size.parameters - size.fixed - fixed_parameters(encoder)
    of_head = objective.size(encoder, num_classes).parameters - encoder_parameters(encoder)
    return new_parameters(tuning, encoder) + of_head


def training_flops(
    encoder: EncoderConfig | TimmEncoderConfig, objective: ObjectiveConfig, num_classes: int,
    tuning: TuningConfig = FULL,
) -> float:  # fmt: skip
    """Floating-point operations per training image: forward 1, backward 2; matrix products only, 2 per multiply-add.

    Of a frozen encoder the backward is 1, to its inputs alone, and none where only the head trains.
    """
    if isinstance(encoder, TimmEncoderConfig):
        size = timm_size(encoder, objective)
        of_encoder = size["flops"] / 3 if tuning.freezes else size["flops"]
        return of_encoder + num_classes * size["flops_per_class"]
    size = objective.size(encoder, num_classes)
    if tuning.freezes:
        frozen, new = encoder_macs(encoder), new_macs(tuning, encoder)
        of_frozen = (2.0 if tuning.kind == "head" else 4.0) * frozen
        return 6.0 * (size.macs - frozen + new) + of_frozen + 2.0 * size.teacher_macs
    return 6.0 * size.macs + 2.0 * size.teacher_macs
