"""What is to be expected of a run: the recipe's own reference curve, where this is the very run it was measured on.

`pipeline/recipes/bands/<recipe>.json` is what `tests.benchmarks.bands` measured: bands, and the data and the config
they hold for. On other data, or with other settings, they would be a guess: then there are none. Torch-free.
"""

from typing import Any

from pipeline.checkpoints.identity import differing_settings
from pipeline.config.recipe import RECIPES
from pipeline.health.bands import FILE, bands_of
from pipeline.preparation.training import PreparedRun
from pipeline.run_directory import RunDirectory, read_json, write_json

REFERENCES = RECIPES / "bands"


def reference_bands(prepared: PreparedRun) -> dict[str, Any] | None:
    """The content of `bands.json` for a prepared training; None where nothing was measured that it can be held to."""
    path = REFERENCES / f"{prepared.name}.json"
    reference = read_json(path)
    if reference is None or prepared.plan.get("rehearsal") or prepared.plan.get("initialise_from"):
        return None
    if reference["data"]["fingerprint"] != prepared.plan["data"]["fingerprint"]:
        return None
    if differing_settings(reference["config"], prepared.config.model_dump(mode="json")):
        return None
    bands_of(reference, str(path))
    return {key: reference[key] for key in ("format_version", "basis", "recipe", "metrics")}


def write_bands(run: RunDirectory, prepared: PreparedRun) -> None:
    """Write the reference into the run directory, or take away that of another config; bands of others stay."""
    path, bands = run.path / FILE, reference_bands(prepared)
    if bands is not None:
        write_json(path, bands)
    elif "recipe" in (read_json(path) or {}):
        path.unlink()
