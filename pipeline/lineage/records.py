"""What this home knows of a model beside its history: where it was scored, and as what it is registered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.forecast.grading import FORECAST, OUTCOME
from pipeline.registry.locate import same_checkpoint
from pipeline.run_directory import RunDirectory, read_json


def evaluations_of(lineage: dict[str, Any], home: Path) -> list[dict[str, Any]]:
    """{run, metrics, intervals, data_fingerprint} of each finished evaluation of this very model, oldest first."""
    found = []
    for run, result in _results(home, "evaluate"):
        for name, scored in (_plan(run).get("sources") or {}).items():
            if _is_same(scored.get("lineage") or {}, lineage) and name in (result.get("metrics") or {}):
                found.append(
                    {
                        "run": str(run.path),
                        "metrics": result["metrics"][name],
                        "intervals": (result.get("intervals") or {}).get(name, {}),
                        "data_fingerprint": result.get("data_fingerprint"),
                        "datasets": result.get("datasets"),
                    }
                )
    return found


def registrations_of(lineage: dict[str, Any], home: Path) -> list[dict[str, Any]]:
    """{uri, promoted, reason, tracking_uri} of each registration of this very model from this home, oldest first."""
    keys = ("uri", "promoted", "reason", "tracking_uri")
    return [
        {key: result.get(key) for key in keys} | {"run": str(run.path)}
        for run, result in _results(home, "register")
        if _is_same((_plan(run).get("source") or {}).get("lineage") or {}, lineage)
    ]


def version_facts(uri: str, tracking_uri: str) -> dict[str, Any]:
    """{aliases, tags} of `models:/NAME/VERSION`, from MLflow."""
    from pipeline.registry.tracking import connect

    name, _, version = uri.removeprefix("models:/").rpartition("/")
    client = connect(tracking_uri)
    aliases = client.get_registered_model(name).aliases
    found = client.get_model_version(name, version)
    return {
        "aliases": sorted(alias for alias, number in aliases.items() if str(number) == version),
        "tags": {key: value for key, value in found.tags.items() if key.startswith(("vit.", FORECAST, OUTCOME))},
    }


def _results(home: Path, stage: str) -> Iterator[tuple[RunDirectory, dict[str, Any]]]:
    """Finished runs of a stage; one that cannot be read is nobody's record."""
    paths = sorted((home / "runs").glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    for path in paths:
        try:
            result = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(result, dict) and result.get("stage") == stage:
            yield RunDirectory(path.parent), result


def _plan(run: RunDirectory) -> dict[str, Any]:
    try:
        return read_json(run.plan_file) or {}
    except ValueError:
        return {}


def _is_same(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """The same registered version, or the same step of the same run."""
    registered = ours.get("registered") is not None and ours.get("registered") == theirs.get("registered")
    steps = [one | {"step": None if one.get("step") is None else int(one["step"])} for one in (theirs, ours)]
    return registered or same_checkpoint(*steps)
