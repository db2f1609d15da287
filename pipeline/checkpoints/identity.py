"""Whose a checkpoint is. A run takes none of another's, in whatever directory or mirror it lies.

A run is its config, but for the keys that may change, on its data. So one that lost its disk and is begun again from
the same recipe is the same run, and one with another seed is not. Torch-free.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.config.plan import StepPlan
from pipeline.config.stages import read_run_config
from pipeline.config.training import LENGTH_UNITS, TrainingConfig
from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory

CHANGEABLE = (  # beginnings of the keys that a run may change on its way
    "zero.", "compile", "activation_checkpointing", "micro_batch_size", "checkpoint.", "validation.", "profiling.",
    "health.", "guard.", "budget_gpu_hours", "writers", "data.max_damaged", "data.verify", "data.record",
)  # fmt: skip
EXTENSIBLE = (*LENGTH_UNITS, "optimizer.cooldown")  # keys that a run at a constant rate may change until it cools down
Facts = Mapping[str, Any]


def facts_of_run(config: TrainingConfig, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What every manifest of a run says of it."""
    return {
        "stage": config.stage,
        "encoder": config.encoder.model_dump(),
        "objective": config.objective.model_dump(),
        "num_classes": plan["num_classes"],
        "ema": config.keeps_average,
        "data_fingerprint": plan["data"]["fingerprint"],
        "config_sha256": plan["config_sha256"],
        "config": config.model_dump(mode="json"),
        "steps": plan["steps"],
    }


def require_own(theirs: Facts, run: RunDirectory, where: object) -> None:
    """InputError where `theirs`, the facts of a manifest at `where`, are not those of this run."""
    ours = facts_of_run(read_run_config(run.path), run.plan())
    if differing := _differing_keys(theirs, ours):
        verb = "differs" if len(differing) == 1 else "differ"
        raise InputError(
            f"{where}: belongs to another run than {run.path} (its {', '.join(differing)} {verb}); choose another "
            "checkpoint.mirror or --run-dir"
        )


def differing_settings(theirs: Facts, ours: Facts) -> list[str]:
    """Keys of two configs, of those that both have, by which their runs learn differently; other seeds do not count."""
    different = _different(_unchangeable(theirs), _unchangeable(ours))
    return [key for key in different if key not in ("seed", "log_every_steps")]


def _differing_keys(theirs: Facts, ours: Facts) -> list[str]:
    """Of the keys that both have, as a program of another version may know more of them, or fewer."""
    known = theirs.get("config") or {key: theirs[key] for key in ("stage", "encoder", "objective")}  # of old
    keys = _different(_unchangeable(known), _unchangeable(ours["config"]))
    if theirs["data_fingerprint"] != ours["data_fingerprint"]:
        keys.append("data")
    return [key for key in keys if not (key in EXTENSIBLE and _are_extensible(theirs, ours))]


def _unchangeable(config: Facts) -> Facts:
    """The config without the paths of its datasets, which their fingerprint stands for."""
    if "data" not in config:
        return config
    sources = [{key: value for key, value in one.items() if key != "path"} for one in config["data"]["sources"]]
    return {**config, "data": {**config["data"], "sources": sources}}


def _different(theirs: Any, ours: Any, key: str = "") -> list[str]:
    if key.startswith(CHANGEABLE):
        return []
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        names = [name for name in theirs if name in ours]
        return [found for name in names for found in _different(theirs[name], ours[name], f"{key}.{name}".lstrip("."))]
    return [] if theirs == ours else [key]


def _are_extensible(theirs: Facts, ours: Facts) -> bool:
    """Whether both are at a constant rate, and the checkpoint, if it is one, is from before either cools down."""
    facts = (theirs, ours)
    constant = all(one["config"]["optimizer"]["schedule"] == "constant" for one in facts)
    return constant and theirs.get("step", 0) <= min(StepPlan(**one["steps"]).cooldown_begins for one in facts)
