"""When the health of a run is measured, and from how many images, where its recipe leaves that open. Torch-free."""

from typing import Any

from models.encoders.config import EncoderConfig
from pipeline.config.plan import plan_steps
from pipeline.config.training import TrainingConfig
from pipeline.config.validation import SPLIT
from pipeline.loading.sources import Sources
from pipeline.preparation.origin import changed

IMAGES_PER_DIMENSION = 2
LEAST_IMAGES, MOST_IMAGES = 256, 4096  # of a split
WIDTH_OF_OTHERS = 1024  # of networks that are no plain ViT
SHARE = 0.02  # images looked at, of those trained on
MOST_MEASUREMENTS = 40


def with_health(config: TrainingConfig, sources: Sources, samples_per_epoch: int, asked_in: str) -> Any:
    """`health.images` and `health.every_steps` as numbers; see `HealthConfig`."""
    width = config.encoder.embed_dim if isinstance(config.encoder, EncoderConfig) else WIDTH_OF_OTHERS
    images = config.health.images or min(max(IMAGES_PER_DIMENSION * width, LEAST_IMAGES), MOST_IMAGES)
    every = config.health.every_steps
    if every is None:
        steps = plan_steps(config, samples_per_epoch)
        count = min(int(SHARE * steps.samples / images_looked_at(images, config, sources)), MOST_MEASUREMENTS)
        every = -(-steps.steps // count) if count else 0
    return changed(config, asked_in, health__images=images, health__every_steps=every)


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
