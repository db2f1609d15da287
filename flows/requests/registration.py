"""From the model that a person wants registered to a registration on disk."""

from collections.abc import Sequence
from pathlib import Path

from flows.home import tracking_uri
from flows.profiles import load_profile
from flows.requests.named import described_model
from flows.requests.stage import write_stage
from pipeline.config.recipe import (
    validate,
)
from pipeline.config.stages import RegisterConfig
from pipeline.errors import InputError
from pipeline.registry.locate import ModelSource, require_tracking_server, unregistrable
from pipeline.run_directory import RunDirectory


def registration_run(model: str, name: str, *, home: Path, evaluations: Sequence[str] = ()) -> RunDirectory:
    """A registration, on disk and ready to submit; always on this machine, in one process."""
    chosen, placement = load_profile("local")
    source = described_model(model, home, instead="register a run")
    if source.kind in ("timm", "hf", "npz"):
        raise InputError(f"MODEL `{model}`: only what was trained here is registered, a run or a checkpoint")
    if reason := unregistrable(source):
        raise InputError(f"MODEL `{model}`: it cannot be registered: {reason}")
    require_tracking_server(tracking_uri(home))
    raw = {
        "model": source.reference,
        "name": name,
        "tracking_uri": tracking_uri(home),
        "evaluations": list(evaluations or _evaluations_of(source, home)),
    }
    config = validate(RegisterConfig, raw, "register")
    plan = {
        "format_version": 1,
        "stage": "register",
        **placement.single().as_plan(),
        "source": source.as_dict(),
        "home": str(home),
    }
    return write_stage(config, plan, f"register-{name}", None, home, chosen)


def _evaluations_of(source: ModelSource, home: Path) -> list[str]:
    """Finished evaluations in this home that scored this very checkpoint, oldest first."""
    found = []
    for result in sorted((home / "runs").glob("evaluate-*/result.json"), key=lambda path: path.stat().st_mtime):
        plan = RunDirectory(result.parent).plan()
        if any(
            scored.get("lineage", {}).get("run") == source.lineage.get("run") for scored in plan["sources"].values()
        ):
            found.append(str(result.parent))
    return found
