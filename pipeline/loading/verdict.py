"""In words: does the loader keep up with the model, and what to change where it does not. Torch-free."""

INPUT_BOUND = 0.1  # share of a step spent waiting for data, above which quicker data would make a quicker run
REMEDIES = (
    "raise profile.loader_workers while cores are idle, ingest smaller images, or set "
    "augmentation.region_decode=true where TurboJPEG 3 is installed"
)


def expected_verdict(loader_images_per_second: float, model_images_per_second: float, workers: int) -> str:
    """Before a run: speeds measured or estimated on this machine, over all ranks."""
    facts = (
        f"the loader gives {loader_images_per_second:,.0f} images/s here with {_workers(workers)}, the model can take "
        f"about {model_images_per_second:,.0f}"
    )
    bound = loader_images_per_second < model_images_per_second
    return f"{facts}: input-bound; {REMEDIES}" if bound else f"{facts}: not input-bound"


def observed_verdict(loader_images_per_second: float, images_per_second: float, wait_share: float, workers: int) -> str:
    """During a run: `wait_share` of its time went by waiting for data."""
    facts = (
        f"the loader can give {loader_images_per_second:,.0f} images/s with {_workers(workers)}; the run takes "
        f"{images_per_second:,.0f} and waits {100 * wait_share:.0f} % of its time for data"
    )
    return f"input-bound: {facts}; {REMEDIES}" if wait_share > INPUT_BOUND else f"not input-bound: {facts}"


def _workers(workers: int) -> str:
    if workers == 0:
        return "no workers (profile.loader_workers=0)"
    return f"{workers} worker{'s' if workers > 1 else ''} per rank"
