"""What a person asks of a lifecycle, refused before its first stage where a later one would refuse it hours on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.profile import LocalProfile
from flows.home import tracking_uri
from flows.profiles import load_profile
from flows.requests.named import dataset
from flows.requests.scorable import LEARNED_FROM, require_scorable
from flows.requests.training import checked_training, written
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import apply_overrides, parse_overrides, recipe_path, split_profile_overrides, validate
from pipeline.config.stages import RegisterConfig
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.loading.sources import Sources
from pipeline.preparation.rehearsal import DAY_SECONDS, length_set_by_hand, seconds_without_accelerator
from pipeline.preparation.training import recipe_config, require_loss_of_label_sets
from pipeline.redaction import without_secrets
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import INDEX_NAME, DatasetIndex
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
        return validate(IngestConfig, apply_overrides({}, parse_overrides(self.ingest_set)), "ingest_set")

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
    _ = asked.ingest_config
    if asked.is_dataset and asked.ingest_set:
        raise InputError(f"ingest_set: {asked.source} is a dataset already, of which nothing is ingested; leave it out")
    of_recipe, of_profile = split_profile_overrides(asked.set)
    load_profile(asked.profile, of_profile)
    load_profile(asked.profile, [*of_profile, *split_profile_overrides(asked.finetune_set)[1]])
    pretraining = recipe_config("pretrain", asked.pretrain_recipe, of_recipe)
    _finetuning(asked, pretraining)
    if asked.scratch_recipe:
        recipe_config("pretrain", asked.scratch_recipe, split_profile_overrides(companion_settings(asked)[0])[0])
    if asked.downstream:
        require_downstream(dataset(asked.downstream, home), asked)


def require_downstream(index: DatasetIndex, asked: LifecycleRequest) -> None:
    """InputError where a dataset cannot be fine-tuned on, or its models not scored: before days of pretraining."""
    if (missing := index.num_unlabelled(LEARNED_FROM)) or not index.num_classes:
        samples = index.num_samples(LEARNED_FROM)
        raise InputError(
            f"{index.directory}: fine-tuning learns labels, and {missing or samples:,} of {samples:,} samples of "
            f"`{LEARNED_FROM}` have none; give them (labels=FILE among the settings of the ingestion), or name a "
            "labelled dataset to fine-tune and evaluate on as downstream"
        )
    pretraining = recipe_config("pretrain", asked.pretrain_recipe, split_profile_overrides(asked.set)[0])
    config, path = _finetuning(asked, pretraining), recipe_path(asked.finetune_recipe)
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
    on_processors = placement.here and placement.accelerators_per_node == 0
    if on_processors and not length_set_by_hand(of_recipe):
        if (seconds := seconds_without_accelerator(prepared)) > DAY_SECONDS:
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
    batch = recipe_config("pretrain", asked.scratch_recipe).global_batch_size
    one_process = ["profile.ranks_per_node=1", "profile.env={OMP_NUM_THREADS: '1'}"]
    return [*asked.of_profile, *one_process, f"micro_batch_size={min(MICRO_BATCH, batch)}"], True


def protocols_for(index: DatasetIndex) -> tuple[str, ...]:
    """What the models of a lifecycle are scored by on a dataset."""
    return PROTOCOLS if index.label_sets is None else PROTOCOLS_OF_LABEL_SETS


def _finetuning(asked: LifecycleRequest, pretraining: TrainingConfig) -> TrainingConfig:
    of_recipe, _ = split_profile_overrides(asked.finetune_set)
    return recipe_config("finetune", asked.finetune_recipe, of_recipe, pretraining.encoder.model_dump(mode="json"))
