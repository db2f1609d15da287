"""In words: does the loader keep up with the model, and what to change where it does not. Torch-free."""

from pipeline.config.training import TrainingConfig
from pipeline.storage.location import is_remote, location

INPUT_BOUND = 0.1  # share of a run's time that waits for data, above which quicker data would make a quicker run


def expected_verdict(
    loader_images_per_second: float, model_images_per_second: float, workers: int, config: TrainingConfig
) -> str:
    """Before a run: the loader's speed measured here, the model's roughly estimated; both over all ranks."""
    facts = (
        f"the loader gives {loader_images_per_second:,.0f} images/s here with {_workers(workers)}, the model can take "
        f"roughly {model_images_per_second:,.0f}"
    )
    if workers == 0:  # loading and computing take turns
        share = model_images_per_second / (loader_images_per_second + model_images_per_second)
    else:
        share = max(0.0, 1 - loader_images_per_second / model_images_per_second)
    return f"{facts}: input-bound; {remedies(workers, config)}" if share > INPUT_BOUND else f"{facts}: not input-bound"


def observed_verdict(
    loader_images_per_second: float, images_per_second: float, wait_share: float, workers: int, config: TrainingConfig
) -> str:
    """During a run: `wait_share` of its time went by waiting for data."""
    facts = (
        f"the run takes {images_per_second:,.0f} images/s and waits {100 * wait_share:.0f} % of its time for data; "
        f"the loader alone could give {loader_images_per_second:,.0f} with {_workers(workers)}"
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
