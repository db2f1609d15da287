"""In words: does the loader keep up with the model, and what to change where it does not. Torch-free."""

from pipeline.config.training import TrainingConfig
from pipeline.storage.location import is_remote, location
from pipeline.words import number_in_words

INPUT_BOUND = 0.1  # share of a run's time that waits for data, above which quicker data would make a quicker run


def expected_images_per_second(loader_images_per_second: float, model_images_per_second: float, workers: int) -> float:
    """What a run makes of a loader and a model of these speeds; without workers they take turns."""
    if workers == 0:
        return 1 / (1 / loader_images_per_second + 1 / model_images_per_second)
    return min(loader_images_per_second, model_images_per_second)


def expected_verdict(
    loader_images_per_second: float, model_images_per_second: float | None, workers: int, config: TrainingConfig
) -> str:
    """Before a run: the loader's speed measured here, the model's roughly estimated or None; both over all ranks."""
    facts = f"the loader gives {number_in_words(loader_images_per_second)} images/s here with {_workers(workers)}"
    if model_images_per_second is None:
        return facts
    facts += f", the model can take roughly {number_in_words(model_images_per_second)}"
    speed = expected_images_per_second(loader_images_per_second, model_images_per_second, workers)
    bound = 1 - speed / model_images_per_second > INPUT_BOUND
    return f"{facts}: input-bound; {remedies(workers, config)}" if bound else f"{facts}: not input-bound"


def observed_verdict(
    loader_images_per_second: float, images_per_second: float, wait_share: float, workers: int, config: TrainingConfig
) -> str:
    """During a run: `wait_share` of its time went by waiting for data."""
    facts = (
        f"the run takes {number_in_words(images_per_second)} images/s and waits {100 * wait_share:.0f} % of its time "
        f"for data; the loader alone could give {number_in_words(loader_images_per_second)} with {_workers(workers)}"
    )
    bound = wait_share > INPUT_BOUND
    return f"input-bound: {facts}; {remedies(workers, config)}" if bound else f"not input-bound: {facts}"


def remedies(workers: int, config: TrainingConfig) -> str:
    """What would make data come quicker, of what this run has not done yet."""
    more_workers = "raise profile.loader_workers while cores are idle"
    if workers == 0:
        more_workers = "set profile.loader_workers to 1 or more, as loading and computing take turns"
    found = [more_workers, "ingest images that are not larger than needed"]
    augmentation = config.augmentation
    if augmentation.crop == "inception" and config.encoder.channels == 3 and not augmentation.region_decode:
        found.append("for JPEGs set augmentation.region_decode=true (TurboJPEG 3)")
    if augmentation.rand_augment_layers:
        found.append("use fewer augmentation.rand_augment_layers")
    if any(is_remote(location(source.path)) for source in config.data.sources):
        found.append("give VIT_SHARD_CACHE a larger or faster disk")
    return ", or ".join(found)


def _workers(workers: int) -> str:
    if workers == 0:
        return "no workers (profile.loader_workers=0)"
    return f"{workers} worker{'s' if workers > 1 else ''} per rank"
