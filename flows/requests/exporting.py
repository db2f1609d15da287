"""From the model that a person wants elsewhere to an export on disk."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.job import JobState
from flows.control.submission import launcher_of
from flows.profiles import load_profile
from flows.requests.named import dataset, described_model, named_destination
from flows.requests.stage import write_stage
from pipeline.config.export import FORMATS, ExportConfig
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError, near_matches
from pipeline.exporting.expressible import inexpressible_export, missing_packages
from pipeline.exporting.folder import require_new, require_unused, require_writable
from pipeline.registry.locate import ModelSource
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import read_index

SETTABLE = ("images", "repeats", "token_reduction", "bounds")


def export_run(
    model: str, destination: str, *, format: str, data: str | None, overrides: Sequence[str], home: Path
) -> RunDirectory:
    """An export, on disk and ready to submit, or the same one that runs now; always on this machine, in one process.

    InputError where another export of this home writes to the destination now.
    """
    _require_format(format)
    settings = _settings(overrides)
    chosen, placement = load_profile("local")
    source = described_model(model, home, instead="export a run or a registered model")
    raw: dict[str, Any] = {
        "model": source.reference, "format": format, "destination": named_destination(destination),
        "data": None if data is None else str(dataset(data, home).directory),
    }  # fmt: skip
    config = validate(ExportConfig, apply_overrides(raw, settings), "--set", settings.keys())
    if reason := inexpressible_export(source, config):
        raise InputError(f"MODEL `{model}`: {reason}")
    require_new(Path(config.destination))
    require_writable(Path(config.destination))
    if (living := _living(config, home)) is not None:
        return living
    require_unused(Path(config.destination))
    plan = {
        "format_version": 1, "stage": "export", **placement.single().as_plan(), "source": source.as_dict(),
        "data": config.data or _trained_on(source),
    }  # fmt: skip
    return write_stage(config, plan, _run_name(format, Path(config.destination).name), None, home, chosen)


def _living(config: ExportConfig, home: Path) -> RunDirectory | None:
    """The run that makes this export now; InputError where one makes another at the same destination."""
    for path in (home / "runs").glob("export-*/job.json"):
        run = RunDirectory(path.parent)
        launcher = launcher_of(run)
        job = launcher.find(run.path)
        if job is None or launcher.state(job) is JobState.ENDED:
            continue
        theirs = read_run_config(run.path)
        if theirs == config:
            return run
        if theirs.destination == config.destination:
            raise InputError(
                f"DEST `{config.destination}`: {run.path.name} writes another export there (format {theirs.format}); "
                f"wait for it, stop it by `vit stop {run.path}`, or name another DEST"
            )
    return None


def _run_name(format: str, destination: str) -> str:
    """Of both; a destination that is named after its format says it."""
    said = format in re.split(r"\W|_", destination.lower())
    return f"export-{destination}" if said else f"export-{format}-{destination}"


def _require_format(format: str) -> None:
    if format not in FORMATS:
        near = near_matches(format, FORMATS)
        hint = near if near.startswith("did") else f"there are: {', '.join(FORMATS)}"
        raise InputError(f"--format {format}: no such format; {hint}")
    if missing := missing_packages(format):
        raise InputError(
            f"--format {format}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; install "
            "what exports need with `uv sync --extra export`"
        )


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """What `--set` may say of an export; the rest is said otherwise."""
    settings = parse_overrides(overrides)
    for key in settings:
        if key.partition(".")[0] not in SETTABLE:
            raise InputError(f"--set {key}: no setting of an export; there are: {', '.join(SETTABLE)}")
    return settings


def _trained_on(source: ModelSource) -> str | None:
    """The dataset that the model learned from, where it lies where it lay, and is the one it was."""
    for one in source.lineage.get("datasets") or ():
        try:
            if read_index(one["path"]).fingerprint == one["fingerprint"]:
                return one["path"]
        except (InputError, OSError):
            continue
    return None
