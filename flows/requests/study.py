"""From a study's file to its cells: which run each is, and why some cannot be. Nothing is written here."""

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.profile import Profile
from flows.profiles import load_profile
from flows.requests.named import dataset
from flows.requests.scorable import require_scorable
from flows.requests.training import checked_training
from pipeline.config.problems import config_classes, kind_of
from pipeline.config.recipe import apply_overrides, parse_overrides, read_yaml, recipe_path, validate
from pipeline.config.study import PROFILE, StudyConfig, StudyNetwork, StudyObjective, read_study, study_path
from pipeline.config.training import LENGTH_UNITS, PretrainConfig, learns_by
from pipeline.errors import InputError
from pipeline.preparation.training import PreparedRun, recipe_config
from pipeline.preparation.write import run_path
from pipeline.shards.index import DatasetIndex

MOST_CELLS = 1000
COUNT_SECONDS = 5.0  # between two lines that say how many are prepared
AXES = ("objectives", "networks", "fractions", "lengths", "seeds")  # keys of the study, the last varies fastest
SPLITS = ("validation", "test")
Report = Callable[[str], None]
OBJECTIVES = {kind_of(one): one for one in config_classes(PretrainConfig.model_fields["objective"].annotation)}


@dataclass(frozen=True)
class Cell:
    """One network, objective, share of the data and seed: the run that it is, or the reason why it cannot be."""

    network: str
    objective: str
    fraction: float
    length: float
    seed: int
    prepared: PreparedRun | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.network} {self.objective} {self.fraction:g} length {self.length:g} seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """A valid study, of which nothing is on disk yet."""

    config: StudyConfig
    cells: tuple[Cell, ...]
    downstream: DatasetIndex
    profile: Profile
    home: Path

    @property
    def directory(self) -> Path:
        return self.home / "studies" / self.config.name

    @property
    def of_profile(self) -> list[str]:
        """Settings of the profile, as `--set` gives them."""
        return as_overrides({key: value for key, value in self.config.set.items() if key.startswith(PROFILE)})

    @property
    def split(self) -> str:
        """The split whose accuracy stands in the table: test, where the dataset has one."""
        return next(one for one in reversed(SPLITS) if self.downstream.splits.get(one))

    def path_of(self, cell: Cell) -> Path:
        """A cell is the ordinary run of its settings, wherever else these were asked for."""
        return run_path(cell.prepared, self.home, None)


def requested_study(file: str, *, overrides: Sequence[str], home: Path, report: Report = lambda line: None) -> Study:
    """Every cell of the study of a file, checked, which takes a second or so each. InputError where anything of it is
    wrong."""
    path, settings = study_path(file), parse_overrides(overrides)
    raw = apply_overrides(read_study(path), settings)
    if "data" not in raw:
        raise InputError(f"{path.name}: data: which images? Name a dataset directory, --set data=DATASET")
    config = validate(StudyConfig, raw, path.name, settings.keys())
    of_profile = [one.removeprefix(PROFILE) for one in as_overrides(config.set) if one.startswith(PROFILE)]
    profile, _ = load_profile(config.profile, of_profile)
    count = math.prod(len(getattr(config, axis)) for axis in AXES)
    if count > MOST_CELLS:
        raise InputError(f"{path.name}: {count:,} cells, a study has {MOST_CELLS:,} at most; name fewer")
    downstream = _scored_dataset(config, home, path)
    _require_recipe(config, path)
    report(f"study {config.name}: preparing {count:,} cells")
    cells, told_at = [], time.monotonic()
    for place in itertools.product(*(getattr(config, axis) for axis in AXES)):
        cells.append(_cell(config, *place, home, path))
        if time.monotonic() - told_at >= COUNT_SECONDS and len(cells) < count:
            told_at = time.monotonic()
            report(f"study {config.name}: {len(cells):,} of {count:,} cells prepared")
    if all(cell.prepared is None for cell in cells):
        raise InputError(f"{path.name}: no cell of the study can be: {cells[0].reason}")
    return Study(config, tuple(cells), downstream, profile, home)


def _scored_dataset(config: StudyConfig, home: Path, path: Path) -> DatasetIndex:
    """What cells are scored on. InputError where the protocol cannot score it, or where one dataset cannot be read."""
    asked, key = config.downstream, "data"
    try:
        index = pretrained_on = dataset(config.data, home)
        if asked.data:
            key = "downstream.data"
            index = dataset(asked.data, home)
        require_scorable(index, [asked.scored_by], SPLITS, {})
        if index.label_sets is not None:
            raise InputError(f"{index.directory}: its images may be of several classes, and a study is of one an image")
        if asked.needs_head and index.classes != pretrained_on.classes:
            raise InputError(f"{index.directory}: {asked.scored_by} needs the classes of {pretrained_on.directory}, "
                             "and these are others; choose linear-cached-v1 or a recipe")  # fmt: skip
        if asked.recipe and (not index.num_samples("train") or index.num_unlabelled("train")):
            raise InputError(
                f"{index.directory}: {asked.recipe} learns from the labels of `train`, and some are missing"
            )
    except InputError as error:
        raise InputError(*(f"{path.name}: {key}: {problem}" for problem in error.problems)) from None
    return index


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """As `--set` gives them: a value in JSON is the same value in YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _cell(
    config: StudyConfig, objective: str, network: str, fraction: float, length: float, seed: int, home: Path, path: Path
) -> Cell:  # fmt: skip
    of_network, of_objective = config.networks[network], config.objectives[objective]
    named = (network, objective, fraction, length, seed)
    settings = config.set | of_objective.set | of_network.set
    try:
        reason = _why_impossible(config, of_network, of_objective, settings)
        if reason:
            return Cell(*named, reason=reason)
        encoder = of_network.encoder.model_dump(mode="json")
        own = {"encoder": encoder, "data.label_fraction": fraction, "seed": seed}
        own |= _length(of_objective.recipe, settings, length)
        prepared, _ = checked_training(
            "pretrain", of_objective.recipe, data=config.data, profile=config.profile,
            overrides=as_overrides(settings | own), home=home, rehearse="never",
        )  # fmt: skip
    except InputError as error:
        where = f"{path.name}: networks.{network} with objectives.{objective}"
        raise InputError(*(f"{where}: {problem}" for problem in error.problems)) from None
    return Cell(*named, prepared)


def _length(recipe: str, settings: Mapping[str, Any], share: float) -> dict[str, float]:
    """The setting that makes a run `share` times as long; none where it is as long as it was."""
    raw = {key: value for key, value in read_yaml(recipe_path(recipe)).items() if key in LENGTH_UNITS}
    lengths = {key: value for key, value in settings.items() if key in LENGTH_UNITS} or raw
    if share == 1.0 or len(lengths) != 1:  # several are said by the config to be wrong
        return {}
    ((unit, amount),) = lengths.items()
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        return {}
    return {unit: amount * share if unit == "epochs" else max(1, round(amount * share))}


def _why_impossible(
    config: StudyConfig, network: StudyNetwork, objective: StudyObjective, settings: Mapping[str, Any]
) -> str:
    """Why a network and an objective make no cell, in words; empty where they do. Wrong settings are no such reason."""
    raw = apply_overrides(read_yaml(recipe_path(objective.recipe)), settings)
    learned = OBJECTIVES.get((raw.get("objective") or {}).get("kind"))
    if learned is None:  # said better by the config that it is wrong in
        return ""
    kind = kind_of(learned)
    if not learns_by(learned, network.encoder):
        return f"{kind} trains plain ViTs alone{_or_swins(learned)}, and {network.encoder.name} is another network"
    if config.downstream.needs_head and not learned.reads_labels:
        return f"{kind} gives no head, and {config.downstream.scored_by} scores one"
    return ""


def _or_swins(objective: Any) -> str:
    return " and Swins" if objective.other_networks == "swin" else ""


def _require_recipe(config: StudyConfig, path: Path) -> None:
    """InputError where the fine-tuning recipe is wrong, as far as can be said before there is a MODEL."""
    downstream = config.downstream
    if downstream.recipe is None:
        return
    try:
        for network in config.networks.values():
            encoder = network.encoder.model_dump(mode="json")
            recipe_config("finetune", downstream.recipe, as_overrides(downstream.set), encoder)
    except InputError as error:
        raise InputError(*(f"{path.name}: downstream.recipe: {problem}" for problem in error.problems)) from None
