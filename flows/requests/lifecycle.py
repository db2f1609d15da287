"""What a person asks of a lifecycle, refused before its first stage where a later one would refuse it hours on."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.profile import LocalProfile
from flows.home import tracking_uri
from flows.profiles import load_profile
from flows.requests.named import dataset
from flows.requests.scorable import require_scorable
from flows.requests.training import checked_training, written
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.ingest import IngestConfig
from pipeline.config.plan import plan_batches
from pipeline.config.recipe import apply_overrides, parse_overrides, recipe_path, split_profile_overrides, validate
from pipeline.config.stages import RegisterConfig
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.ingestion.opening import KINDS
from pipeline.ingestion.sources.digits import DIGITS
from pipeline.loading.sources import Sources
from pipeline.preparation.rehearsal import days_here, length_set_by_hand
from pipeline.preparation.training import recipe_config, require_loss_of_label_sets
from pipeline.redaction import without_secrets
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import INDEX_NAME, DatasetIndex
from pipeline.storage.location import is_url
from pipeline.words import duration_in_words

PROTOCOLS = ("classify-v1", "calibration-v1", "knn-20-v1", "linear-cached-v1", "fewshot-lsr-v1")
MICRO_BATCH = 64  # of companions without an accelerator
PROTOCOLS_OF_LABEL_SETS = ("classify-v1",)  # the others are of one class an image


@dataclass(frozen=True)
class LifecycleRequest:
    """What the flow's parameters say; see there."""

    source: str
    name: str = "vit"
    pretrain_recipe: str = "pretrain_mae_vit_s16"
    finetune_recipe: str = "finetune_vit"
    scratch_recipe: str | None = None
    downstream: str | None = None
    profile: str = "local"
    set: Sequence[str] = ()
    finetune_set: Sequence[str] = ()
    ingest_set: Sequence[str] = ()

    @property
    def is_dataset(self) -> bool:
        """Whether the source is a dataset directory, of which nothing is ingested."""
        return (Path(self.source) / INDEX_NAME).is_file()

    @property
    def ingest_config(self) -> IngestConfig:
        return validate(IngestConfig, apply_overrides({}, parse_overrides(self.ingest_set)), "--ingest-set")

    @property
    def of_profile(self) -> list[str]:
        """Settings of the profile, which every stage on it has; those of the recipe are pretraining's alone."""
        return [one for one in self.set if one.startswith("profile.")]

    def told(self) -> dict[str, Any]:
        """For a report, without secrets; the source stands there beside it."""
        return {
            "pretrain_recipe": self.pretrain_recipe, "finetune_recipe": self.finetune_recipe,
            "scratch_recipe": self.scratch_recipe, "downstream": self.downstream, "profile": self.profile,
            "set": [without_secrets(one) for one in self.set],
            "finetune_set": [without_secrets(one) for one in self.finetune_set],
            "ingest_set": [without_secrets(one) for one in self.ingest_set],
        }  # fmt: skip


def require_valid(asked: LifecycleRequest, home: Path) -> None:
    """InputError for whatever is wrong in any stage, as far as can be said before there is a dataset."""
    raw = {"model": "a run to come", "name": asked.name, "tracking_uri": tracking_uri(home)}
    validate(RegisterConfig, raw, "lifecycle")
    _require_source(asked)
    pretraining = _config("pretrain", asked.pretrain_recipe, asked.set, asked, "--set")
    if "initialise_from" in parse_overrides(asked.finetune_set):
        raise InputError("--finetune-set initialise_from: what was pretrained is fine-tuned; leave it out")
    _finetuning(asked, [*asked.of_profile, *asked.finetune_set])
    if asked.scratch_recipe:
        _require_comparable(asked, pretraining)
    if asked.downstream is not None:
        if not asked.downstream.strip():
            raise InputError("--downstream is empty; name a labelled dataset, or leave it out")
        require_downstream(dataset(asked.downstream, home), asked)


def _require_source(asked: LifecycleRequest) -> None:
    _ = asked.ingest_config
    if asked.is_dataset and asked.ingest_set:
        raise InputError(f"--ingest-set: {asked.source} is a dataset, of which nothing is ingested; leave it out")
    is_path = not (asked.source == DIGITS or is_url(asked.source) or set(asked.source) & set("*?[{"))
    if is_path and not Path(asked.source).exists():
        raise InputError(f"{asked.source}: no such folder; {KINDS}")


def _require_comparable(asked: LifecycleRequest, pretraining: TrainingConfig) -> None:
    settings, _ = companion_settings(asked)
    scratch = _config("pretrain", asked.scratch_recipe, settings, asked, "--set")
    if not scratch.objective.reads_labels:
        raise InputError(f"{asked.scratch_recipe}: learns no labels, so there is nothing to compare")
    if scratch.encoder.name != pretraining.encoder.name:
        raise InputError(
            f"{asked.scratch_recipe}: trains {scratch.encoder.name} and {asked.pretrain_recipe} "
            f"{pretraining.encoder.name}, which cannot be compared; take a recipe of the same network"
        )
    _finetuning(asked, [*asked.finetune_set, *settings])


def require_downstream(index: DatasetIndex, asked: LifecycleRequest) -> None:
    """InputError where a dataset cannot be fine-tuned on, or its models not scored: before days of pretraining."""
    config = _finetuning(asked, [*asked.of_profile, *asked.finetune_set])
    split, path = config.data.split, recipe_path(asked.finetune_recipe)
    if (missing := index.num_unlabelled(split)) or not index.num_classes:
        samples = index.num_samples(split)
        raise InputError(
            f"{index.directory}: fine-tuning learns labels, and {missing or samples:,} of {samples:,} samples of "
            f"`{split}` have none; give them (--ingest-set labels=FILE, and another --name), or name a labelled "
            "dataset to fine-tune and evaluate on (--downstream DATASET)"
        )
    require_loss_of_label_sets(config, Sources((index,)), path)
    require_scorable(index, protocols_for(index), EvaluateConfig.model_fields["splits"].default, {})


def pretraining_run(asked: LifecycleRequest, data: Path, home: Path) -> RunDirectory:
    """The pretraining, on disk and ready to submit. InputError where it would take more than a day of processors that
    nobody asked for by a length of their own: `vit pretrain` rehearses such a run."""
    prepared, profile = checked_training(
        "pretrain", asked.pretrain_recipe, data=str(data), profile=asked.profile, overrides=asked.set, home=home,
        rehearse="never",
    )  # fmt: skip
    of_recipe, of_profile = split_profile_overrides(asked.set)
    _, placement = load_profile(asked.profile, of_profile)
    if not length_set_by_hand(of_recipe) and (seconds := days_here(prepared, placement)) is not None:
        raise InputError(
            f"{asked.pretrain_recipe}: would take some {duration_in_words(seconds)} here, without an accelerator; "
            "say how long (--set epochs=1), take a smaller recipe, or a profile of a cluster"
        )
    return written(prepared, profile, None, home)


def companion_settings(asked: LifecycleRequest) -> tuple[list[str], bool]:
    """Settings of the trainings that are compared, and whether two sets of them run side by side.

    They do on processors of this machine, one process each, which wastes nothing between small steps; elsewhere each
    has all that the profile offers.
    """
    profile, placement = load_profile(asked.profile, split_profile_overrides(asked.set)[1])
    if not isinstance(profile, LocalProfile) or placement.accelerators_per_node:
        return asked.of_profile, False
    batch = math.gcd(
        recipe_config("pretrain", asked.scratch_recipe).global_batch_size,
        _finetuning(asked, asked.finetune_set, placed=False).global_batch_size,
    )
    micro_batch = max(size for size in range(1, MICRO_BATCH + 1) if batch % size == 0)
    one_process = ["profile.ranks_per_node=1", "profile.env.OMP_NUM_THREADS='1'"]
    return [*asked.of_profile, *one_process, f"micro_batch_size={micro_batch}"], True


def protocols_for(index: DatasetIndex) -> tuple[str, ...]:
    """What the models of a lifecycle are scored by on a dataset."""
    return PROTOCOLS if index.label_sets is None else PROTOCOLS_OF_LABEL_SETS


def _finetuning(asked: LifecycleRequest, settings: Sequence[str], *, placed: bool = True) -> TrainingConfig:
    of_recipe, _ = split_profile_overrides(asked.set)
    encoder = recipe_config("pretrain", asked.pretrain_recipe, of_recipe).encoder.model_dump(mode="json")
    return _config("finetune", asked.finetune_recipe, settings, asked, "--finetune-set", encoder, placed=placed)


def _config(
    stage: str, recipe: str, settings: Sequence[str], asked: LifecycleRequest, flag: str,
    encoder: dict[str, Any] | None = None, *, placed: bool = True,
) -> TrainingConfig:  # fmt: skip
    """A recipe with settings that `flag` gave, whose batches, where it is `placed`, its profile's ranks can share."""
    of_recipe, of_profile = split_profile_overrides(settings)
    try:
        config = recipe_config(stage, recipe, of_recipe, encoder)
        _, placement = load_profile(asked.profile, of_profile)
        if placed:
            plan_batches(config.global_batch_size, config.micro_batch_size, placement.world_size)
        return config
    except InputError as error:
        of_batch = ((f"{recipe}: {line}" if line.startswith("global_batch_size") else line) for line in error.problems)
        raise InputError(*(re.sub("^--set ", f"{flag} ", line) for line in of_batch)) from None
