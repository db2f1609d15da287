"""From what a person wants embedded, or looked for, to an embedding on disk."""

from collections.abc import Sequence
from pathlib import Path

from flows.profiles import load_profile
from flows.requests.named import dataset, described_model, named_destination
from flows.requests.stage import write_stage
from pipeline.config.embed import EmbedConfig
from pipeline.config.recipe import apply_overrides, parse_overrides, split_profile_overrides, validate
from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory


def embedding_run(
    model: str, destination: str, *, data: str | None, queries: Sequence[str], profile: str, overrides: Sequence[str],
    home: Path,
) -> RunDirectory:  # fmt: skip
    """Features of every image of a dataset, on disk and ready to submit."""
    of_stage, of_profile = split_profile_overrides(overrides)
    chosen, placement = load_profile(profile, of_profile)
    source = described_model(model, home, instead="embed with a run or a registered model")
    index = dataset(data, home)
    if index is None:
        raise InputError("no data: name a dataset directory with --data")
    files = [Path(query).expanduser().absolute() for query in queries]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"--query {missing[0]}: there is no such file")
    raw = {
        "model": source.reference, "data": str(index.directory),
        "destination": named_destination(destination), "query": [str(file) for file in files],
    }  # fmt: skip
    settings = parse_overrides(of_stage)
    config = validate(EmbedConfig, apply_overrides(raw, settings), "--set", settings.keys())
    if not any(split in index.splits for split in config.splits):
        raise InputError(f"--set splits: {index.directory} has none of them, only {', '.join(index.splits)}")
    if Path(config.destination).exists() and not Path(config.destination).is_dir():
        raise InputError(f"{config.destination}: is a file; DEST is a folder")
    plan = {
        "format_version": 1, "stage": "embed", **placement.as_plan(), "source": source.as_dict(),
        "precision": config.precision,
        "data": {"path": str(index.directory), "name": index.directory.name, "fingerprint": index.fingerprint},
    }  # fmt: skip
    return write_stage(config, plan, f"embed-{index.directory.name}", None, home, chosen)
