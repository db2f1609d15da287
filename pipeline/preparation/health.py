"""When the health of a run is measured, and from how many images, where its recipe leaves that open. Torch-free."""

import math
from typing import Any

from models.encoders.config import EncoderConfig
from pipeline.config.health import HealthConfig
from pipeline.config.plan import plan_steps
from pipeline.config.training import TrainingConfig
from pipeline.config.validation import SPLIT
from pipeline.errors import InputError
from pipeline.loading.sources import Sources
from pipeline.preparation.origin import changed

IMAGES_PER_DIMENSION = 4  # `measures.LEAST_RATIO`, whose module needs torch; a test holds them together
LEAST_IMAGES, MOST_IMAGES = 256, 8192  # of a split
WIDTH_OF_OTHERS = 1024  # of networks that are no plain ViT
SHARE = 0.02  # images looked at, of those trained on
MOST_MEASUREMENTS = 40


def with_health(config: TrainingConfig, sources: Sources, samples_per_epoch: int, asked_in: str) -> Any:
    """`health.images` and `health.every_steps` as numbers; see `HealthConfig`."""
    width = config.encoder.embed_dim if isinstance(config.encoder, EncoderConfig) else WIDTH_OF_OTHERS
    images = config.health.images or min(max(IMAGES_PER_DIMENSION * width, LEAST_IMAGES), MOST_IMAGES)
    steps, every = plan_steps(config, samples_per_epoch), config.health.every_steps
    most = most_steps_between(config.health, steps.steps)
    if every is None:
        count = min(int(SHARE * steps.samples / images_looked_at(images, config, sources)), MOST_MEASUREMENTS)
        every = -(-steps.steps // count) if count else 0
        if config.health.policy != "report":
            every = min(every or steps.steps, most)
    _require_that_the_policy_can_act(config.health, every, most, steps.steps, asked_in)
    return changed(config, asked_in, health__images=images, health__every_steps=every)


def measurements_settled(health: HealthConfig, every: int, steps: int) -> int:
    """How many measurements lie behind `settling`, of a run of `steps` that is measured `every` so many."""
    if not every:
        return 0
    first = max(1, math.ceil(health.settling * steps - 1e-9))
    return steps // every - (first - 1) // every + (steps % every > 0)


def most_steps_between(health: HealthConfig, steps: int) -> int:
    """The longest cadence that has `patience` measurements behind `settling`; 0 where the run is too short for any."""
    shortest = max(1, math.ceil(health.settling * steps - 1e-9))
    return (steps - shortest + 1) // health.patience


def _require_that_the_policy_can_act(health: HealthConfig, every: int, most: int, steps: int, asked_in: str) -> None:
    found = measurements_settled(health, every, steps)
    if health.policy == "report" or found >= health.patience:
        return
    fix = f"set it to {most} or less" if most else "set health.patience to 1, or make the run longer"
    raise InputError(
        f"{asked_in}: health.every_steps: {every} leaves {found} measurements behind health.settling "
        f"({health.settling:g} of {steps:,} steps), and health.policy {health.policy} acts after {health.patience} bad "
        f"ones in a row: it never would; {fix}, or health.policy to report"
    )


def bytes_of_images(config: TrainingConfig, sources: Sources) -> int:
    """Of the images that all ranks together keep between measurements, as they were read."""
    if not config.health.every_steps:
        return 0
    height, width = config.encoder.input_size
    return images_looked_at(config.health.images, config, sources) * height * width * config.encoder.channels


def images_looked_at(images: int, config: TrainingConfig, sources: Sources) -> int:
    """In one measurement, at most."""
    splits = {config.data.split, SPLIT}
    sizes = [sum(index.num_samples(split) for index in sources.indexes if split in index.splits) for split in splits]
    return sum(min(images, size) for size in sizes)
