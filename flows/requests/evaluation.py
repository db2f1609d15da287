"""From what a person asked to have scored to an evaluation on disk."""

from collections.abc import Sequence
from pathlib import Path

from flows.profiles import load_profile
from flows.requests.named import dataset, described_model
from flows.requests.stage import write_stage
from pipeline.config.recipe import (
    apply_overrides,
    parse_overrides,
    split_profile_overrides,
    validate,
)
from pipeline.config.stages import PROTOCOLS, EvaluateConfig
from pipeline.errors import InputError, near_matches
from pipeline.registry.locate import ModelSource
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import DatasetIndex


def evaluation_run(
    models: dict[str, str], *, data: str | None, protocols: Sequence[str], profile: str, overrides: Sequence[str],
    run_dir: str | None, home: Path,
) -> RunDirectory:  # fmt: skip
    """An evaluation of models on a dataset, on disk and ready to submit."""
    of_stage, of_profile = split_profile_overrides(overrides)
    chosen, placement = load_profile(profile, of_profile)
    index = dataset(data, home)
    if index is None:
        raise InputError("no data: name a dataset directory with --data")
    instead = "evaluate a run or a registered model"
    sources = {name: described_model(reference, home, instead=instead) for name, reference in models.items()}
    with_head = all(source.num_classes for source in sources.values())
    chosen_protocols = list(protocols) or [p for p in PROTOCOLS if with_head or p != "classify-v1"]
    for protocol in chosen_protocols:
        if protocol not in PROTOCOLS:
            raise InputError(f"protocol `{protocol}` does not exist; {near_matches(protocol, PROTOCOLS)}")
    if "classify-v1" in chosen_protocols and (headless := [n for n, s in sources.items() if not s.num_classes]):
        raise InputError(f"protocol classify-v1 scores a model's own head, and {', '.join(headless)} has none")
    raw = {
        "models": models, "data": str(index.directory), "dataset": index.directory.name,
        "protocols": chosen_protocols, "split": "test" if "test" in index.splits else "validation",
    }  # fmt: skip
    config = validate(EvaluateConfig, apply_overrides(raw, parse_overrides(of_stage)), "--set")
    _require_labels(index, config)
    if "classify-v1" in config.protocols:
        _require_classes(index, sources)
    plan = {
        "format_version": 1, "stage": "evaluate", **placement.as_plan(), "precision": placement.precision("bf16"),
        "data": {"path": str(index.directory), "name": index.directory.name, "fingerprint": index.fingerprint},
        "sources": {name: source.as_dict() for name, source in sources.items()},
    }  # fmt: skip
    return write_stage(config, plan, f"evaluate-{index.directory.name}", run_dir, home, chosen)


def _require_labels(index: DatasetIndex, config: EvaluateConfig) -> None:
    learned = any(protocol != "classify-v1" for protocol in config.protocols)
    for split in [config.split, *(["train"] if learned else [])]:
        if missing := index.num_unlabelled(split):
            raise InputError(
                f"{index.directory}: evaluation needs labels, and {missing:,} of {index.num_samples(split):,} samples "
                f"of `{split}` have none"
            )


def _require_classes(index: DatasetIndex, sources: dict[str, ModelSource]) -> None:
    for source in sources.values():
        if tuple(source.classes) != tuple(index.classes):
            ours, theirs = (
                f"{len(c)} ({', '.join(c[:5])}{', ...' if len(c) > 5 else ''})" for c in (source.classes, index.classes)
            )
            raise InputError(
                f"MODEL `{source.reference}` knows classes {ours}, the dataset has {theirs}; "
                "score it without its head: --protocol knn-20-v1 --protocol linear-cached-v1"
            )
