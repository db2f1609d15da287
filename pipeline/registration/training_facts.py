"""What the run directory and the datasets say of how a checkpoint came to be, for its model card. Torch-free."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.budget import hours_of
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import FaultError, InputError
from pipeline.forecast.grading import forecast_of, graded_by, is_of
from pipeline.registry.integrity import sha256_of
from pipeline.registry.locate import ModelSource
from pipeline.run_directory import RunDirectory, read_json
from pipeline.shards.index import read_index
from pipeline.words import number_in_words

SOFTWARE = ("torch", "deepspeed", "timm")


def training_facts(source: ModelSource) -> dict[str, Any] | None:
    """{data, recipe, compute} of the run that made this checkpoint; None where that run is not on this machine."""
    path = source.lineage.get("run")
    if not path or not Path(path, "config.yaml").is_file():
        return None
    run = RunDirectory(path)
    config, plan, provenance = read_run_config(run.path), run.plan(), read_json(run.provenance_file) or {}
    if not isinstance(config, TrainingConfig):
        return None
    step = int(source.lineage.get("step") or plan["steps"]["steps"])
    return {
        "data": _datasets(config, plan),
        "recipe": _recipe(config, plan, provenance, step),
        "compute": _compute(run, plan, provenance),
    }


def forecast_facts(
    source: ModelSource, metrics: Mapping[str, float], scored: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """By name, what was forecast of the run that made this checkpoint, with `outcome` and `inside` where they are known
    by its end or by the evaluations that it is registered with; {} where nothing was forecast, or of another run than
    this became."""
    path = source.lineage.get("run")
    if not path or not Path(path).is_dir():
        return {}
    run = RunDirectory(path)
    said, ended = forecast_of(run), read_json(run.result_file) or {}
    if said and not is_of(said, run):
        return {}
    found = {name: dict(one) for name, one in said.get("forecasts", {}).items()}
    if source.lineage.get("step") == ended.get("steps"):
        found |= graded_by(said, metrics, scored)
    return found | (ended.get("forecast") or {})


def _datasets(config: TrainingConfig, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    trained_on = f"split `{config.data.split}`"
    if config.data.label_fraction < 1:
        trained_on += f", {config.data.label_fraction:.3g} of the labels"
    mixture = plan["data"].get("sources") or [plan["data"]]
    facts = []
    for one in mixture:
        weight = {"weight": one["weight"]} if "weight" in one else {}
        name = one.get("name") or Path(one["path"]).name
        known = {"name": name, "fingerprint": one["fingerprint"], "trained_on": trained_on} | weight
        facts.append(known | _of_dataset(one["path"], one["fingerprint"]))
    return facts


def _of_dataset(path: str, fingerprint: str) -> dict[str, Any]:
    """Counts and certificate of a dataset that is where it was, and what it was; else nothing."""
    try:
        index = read_index(path)
    except (InputError, FaultError, OSError):
        return {}
    if index.fingerprint != fingerprint:
        return {}
    facts: dict[str, Any] = {"splits": {split: index.num_samples(split) for split in index.splits}}
    if licence := index.provenance.get("licence"):
        facts["licence"] = str(licence)
    certificate = Path(path, "certificate.json")
    return facts | ({"certificate_sha256": sha256_of(certificate)} if certificate.is_file() else {})


def _recipe(
    config: TrainingConfig, plan: Mapping[str, Any], provenance: Mapping[str, Any], step: int
) -> dict[str, Any]:
    seen = step * config.global_batch_size
    optimizer, code = config.optimizer, provenance.get("code") or {}
    facts: dict[str, Any] = {
        "stage": config.stage,
        "length": f"{step:,} of {plan['steps']['steps']:,} steps of {config.global_batch_size:,} images: "
                  f"{seen:,} images, {number_in_words(seen / plan['samples_per_epoch'])} epochs",
        "optimizer": f"{optimizer.kind}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}",
        "seed": str(config.seed),
    }  # fmt: skip
    parent = plan.get("initialise_from") or {}
    if learned := (parent.get("lineage") or {}).get("data_fingerprint"):
        facts["parent's data"] = f"fingerprint `{learned}`"
    if code.get("commit"):
        facts["code"] = f"commit `{code['commit']}`{', with changes of its own' if code.get('dirty') else ''}"
    if provenance.get("command"):
        facts["command"] = f"`{' '.join(['vit', *provenance['command'][1:]])}`"
    return facts


def _compute(run: RunDirectory, plan: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    per_node = plan.get("accelerators_per_node", 0)
    hours = "GPU-hours" if per_node else "hours of ranks (processes without accelerator)"
    beats = [read_json(path) or {} for path in run.attempts.glob("*/heartbeat/node-*")]
    hosts = sorted({beat["host"] for beat in beats if beat.get("host")})
    packages = provenance.get("packages") or {}
    ranks = plan.get("ranks_per_node", 1)
    return {
        "attempts": run.last_attempt(),
        hours: hours_of(run),
        "nodes": f"{len(hosts) or plan.get('nodes', 1)}, with {ranks} {'rank' if ranks == 1 else 'ranks'}"
        + (f" and {per_node} accelerators each" if per_node else " each, no accelerator"),
        "precision": plan.get("precision", "not known"),
        "software": ", ".join(
            f"{name} {packages[name]}" for name in ("torch", "deepspeed", "timm") if packages.get(name)
        ),
    }
