"""From the model that a person wants to look into to an inspection on disk."""

from collections.abc import Sequence
from pathlib import Path

from flows.home import tracking_uri
from flows.profiles import load_profile
from flows.requests.named import described_model
from flows.requests.stage import write_stage
from pipeline.config.recipe import (
    apply_overrides,
    parse_overrides,
    split_profile_overrides,
    validate,
)
from pipeline.config.stages import InspectConfig
from pipeline.errors import InputError
from pipeline.inspection.sources import absolute, dataset_of, image_files, require_destination, spread
from pipeline.registry.locate import ModelSource, undrawable
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import read_index


def inspection_run(
    model: str, images: Sequence[str], destination: str, *, overrides: Sequence[str], home: Path
) -> RunDirectory:
    """Pictures of what a model learned, on disk and ready to submit; always on this machine, in one process."""
    of_stage, of_profile = split_profile_overrides(overrides)
    chosen, placement = load_profile("local", of_profile)
    source = described_model(model, home, instead="inspect a run")
    if reason := undrawable(source):
        raise InputError(f"MODEL `{model}`: {reason}")
    raw = {
        "model": source.reference, "source": [absolute(path) for path in images], "destination": absolute(destination),
        "tracking_uri": tracking_uri(home),
    }  # fmt: skip
    settings = parse_overrides(of_stage)
    config = validate(InspectConfig, apply_overrides(raw, settings), "--set", settings.keys())
    if config.mask is not None:
        config = config.model_copy(update={"mask": _mask(config.mask, source)})
    require_destination(Path(config.destination))
    plan = {
        "format_version": 1, "stage": "inspect", **placement.single().as_plan(), "source": source.as_dict(),
        **_images_to_inspect(config),
    }  # fmt: skip
    return write_stage(config, plan, f"inspect-{Path(config.destination).name}", None, home, chosen)


def _images_to_inspect(config: InspectConfig) -> dict:
    """Of a plan: the dataset and its split, or the files that were chosen."""
    if (directory := dataset_of(config.source)) is None:
        if config.split is not None:
            raise InputError(f"--set split={config.split}: only a dataset has splits, IMAGES are files; leave it out")
        return {"images": spread(image_files(config.source), config.images)}
    index = read_index(directory, check_sizes=True)
    split = config.split or next(name for name in ("test", "validation", "train") if name in index.splits)
    index.shards(split)
    return {"data": {"path": str(index.directory), "fingerprint": index.fingerprint}, "split": split}


def _mask(mask: str, source: ModelSource) -> str:
    """Where the mask is, absolute. InputError where it is not, or the model cannot fill in what it covers."""
    path = Path(mask).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"--set mask={mask}: there is no such file")
    if source.kind != "checkpoint" or source.objective != "mae":
        raise InputError(
            f"--set mask={mask}: MODEL `{source.reference}` has no decoder that fills in; name a run of objective mae"
        )
    return str(path)
