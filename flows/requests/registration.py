"""From the model that a person wants registered to a registration on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.home import tracking_uri
from flows.profiles import load_profile
from flows.requests.named import described_model
from flows.requests.stage import write_stage
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.config.stages import RegisterConfig
from pipeline.errors import InputError
from pipeline.registry.locate import ModelSource, same_checkpoint, unregistrable
from pipeline.registry.store_file import require_writable_store
from pipeline.registry.versions import require_tracking_server
from pipeline.run_directory import RunDirectory, read_json

SETTABLE = ("evaluations", "licence", "promotion_margin")


def registration_run(
    model: str, name: str, *, home: Path, evaluations: Sequence[str] = (), overrides: Sequence[str] = ()
) -> RunDirectory:
    """A registration, on disk and ready to submit; always on this machine, in one process."""
    chosen, placement = load_profile("local")
    raw = {"model": model, "name": name, "tracking_uri": tracking_uri(home), "evaluations": list(evaluations)}
    raw = apply_overrides(raw, _settings(overrides))
    validate(RegisterConfig, raw, "register")  # before anything is looked for
    source = described_model(model, home, instead="register a run")
    if source.kind in ("timm", "hf", "npz"):
        raise InputError(f"MODEL `{model}`: only what was trained here is registered, a run or a checkpoint")
    if reason := unregistrable(source):
        raise InputError(f"MODEL `{model}`: it cannot be registered: {reason}")
    _require_evaluations_of(source, raw["evaluations"])
    require_tracking_server(tracking_uri(home))
    require_writable_store(tracking_uri(home))
    raw |= {"model": source.reference, "evaluations": raw["evaluations"] or _evaluations_of(source, home)}
    config = validate(RegisterConfig, raw, "register")
    plan = {
        "format_version": 1,
        "stage": "register",
        **placement.single().as_plan(),
        "source": source.as_dict(),
        "home": str(home),
    }
    return write_stage(config, plan, f"register-{name}", None, home, chosen)


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    """What `--set` may say of a registration; the rest is said otherwise."""
    settings = parse_overrides(overrides)
    for key in settings:
        if key not in SETTABLE:
            raise InputError(f"--set {key}: no setting of a registration; there are: {', '.join(SETTABLE)}")
    return settings


def _require_evaluations_of(source: ModelSource, evaluations: Sequence[str]) -> None:
    """InputError for the first that is not a finished evaluation of this very checkpoint."""
    for path in evaluations:
        run = RunDirectory(path)
        result = (read_json(run.result_file) if Path(path).is_dir() else None) or {}
        if result.get("stage") != "evaluate" or not run.plan_file.is_file():
            raise InputError(f"{path}: not a finished evaluation: name the run directory of one, whole")
        sources = {name: one for name, one in run.plan()["sources"].items() if name in result["metrics"]}
        if not any(same_checkpoint(one["lineage"], source.lineage) for one in sources.values()):
            scored = ", ".join(_checkpoint_in_words(name, one["lineage"]) for name, one in sources.items())
            raise InputError(
                f"{path}: an evaluation of {scored or 'no model'}, not of "
                f"{_checkpoint_in_words(source.reference, source.lineage)}; leave it out, or evaluate this checkpoint"
            )


def _checkpoint_in_words(name: str, lineage: dict[str, Any]) -> str:
    return f"step {lineage.get('step')} of {lineage['run']}" if lineage.get("run") else name


def _evaluations_of(source: ModelSource, home: Path) -> list[str]:
    """Finished evaluations in this home that scored this very checkpoint, newest first."""
    found = []
    for result in sorted((home / "runs").glob("*/result.json"), key=lambda path: -path.stat().st_mtime):
        run = RunDirectory(result.parent)
        if (read_json(result) or {}).get("stage") != "evaluate" or not run.plan_file.is_file():
            continue
        scored = run.plan().get("sources", {}).values()
        if any(same_checkpoint(one.get("lineage", {}), source.lineage) for one in scored):
            found.append(str(run.path))
    return found
