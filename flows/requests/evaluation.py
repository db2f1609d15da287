"""From what a person asked to have scored to an evaluation that is valid, with what has to be trained for it first."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.profile import Profile
from flows.profiles import load_profile
from flows.requests.named import dataset, described_model
from flows.requests.scorable import LEARNED_FROM, require_heads, require_scorable
from flows.requests.stage import write_stage
from flows.requests.training import checked_training, sequence_run, written
from pipeline.config.evaluation import EvaluateConfig, SuiteConfig
from pipeline.config.protocols import BY_DEFAULT, FORGETTING, NEEDS, OF_FORGETTING, PROTOCOLS
from pipeline.config.recipe import apply_overrides, parse_overrides, read_yaml, split_profile_overrides, validate
from pipeline.errors import FaultError, InputError, near_matches
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import PreparedRun
from pipeline.preparation.write import run_path
from pipeline.registry.locate import ModelSource, unknown_classes
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import DatasetIndex

INSTEAD = "evaluate a run or a registered model"


@dataclass(frozen=True)
class Training:
    """A training that a protocol asks for: checked, not yet written. `name` is what its metrics are called by."""

    model: str
    dataset: str
    name: str
    prepared: PreparedRun
    profile: Profile


@dataclass(frozen=True)
class Evaluation:
    """A valid evaluation, of which nothing is on disk yet."""

    name: str
    raw: dict[str, Any]
    overrides: list[str]
    sources: dict[str, ModelSource]
    indexes: dict[str, DatasetIndex]
    trainings: tuple[Training, ...]
    profile: Profile
    placement: Placement
    home: Path
    run_dir: str | None
    where: str  # the profile, as it was named
    of_profile: list[str]  # settings of it

    def train(self) -> list[RunDirectory]:
        """The runs of the trainings, on disk; those of equal settings from the same checkpoint are the same run."""
        return [written(one.prepared, one.profile, str(self.path_of(one)), self.home) for one in self.trainings]

    def path_of(self, training: Training) -> Path:
        """A MODEL may stand for another checkpoint tomorrow, and its probes are then others."""
        source = self.sources[training.model]
        checkpoint = hashlib.sha256(f"{source.reference}\n{source.path}".encode()).hexdigest()[:6]
        path = run_path(training.prepared, self.home, None)
        return path.with_name(f"{path.name}-{checkpoint}")

    def sequence(self, runs: Sequence[RunDirectory]) -> RunDirectory:
        """All trainings in one set of processes, on disk and ready to submit; the same again for the same ones."""
        key = hashlib.sha256("\n".join(str(run.path) for run in runs).encode()).hexdigest()[:8]
        return sequence_run(
            runs, profile=self.where, overrides=self.of_profile, home=self.home,
            run_dir=str(self.home / "runs" / f"sequence-{key}"),
        )  # fmt: skip

    def write(self) -> RunDirectory:
        """The evaluation on disk, ready to submit. To be called when its trainings are done."""
        trained: dict[str, dict[str, dict[str, str]]] = {}
        of_runs = {}
        for one, run in zip(self.trainings, self.train(), strict=True):
            trained.setdefault(one.model, {}).setdefault(one.dataset, {})[one.name] = str(run.path)
            of_runs[str(run.path)] = described_model(str(run.path), self.home, instead=INSTEAD).as_dict()
        config = self.config(trained)
        fingerprints = {index.fingerprint for index in self.indexes.values()}
        first = next(iter(self.indexes.values()))
        plan = {
            "format_version": 2, "stage": "evaluate", **self.placement.as_plan(), "precision": config.precision,
            "data": {
                "path": ", ".join(str(index.directory) for index in self.indexes.values()),
                "name": "+".join(self.indexes),
                "fingerprint": first.fingerprint if len(fingerprints) == 1 else None,
            },
            "sources": {name: source.as_dict() for name, source in self.sources.items()},
            "trained": of_runs, "home": str(self.home),
        }  # fmt: skip
        return write_stage(config, plan, f"evaluate-{self.name}", self.run_dir, self.home, self.profile)

    def config(self, trained: Mapping[str, Any] | None = None) -> EvaluateConfig:
        raw = apply_overrides(self.raw | {"trained": trained or {}}, parse_overrides(self.overrides))
        return validate(EvaluateConfig, raw, "--set")


def model_name(reference: str) -> str:
    """A MODEL's name in a table: the last part of a path, the reference where it is none."""
    return reference if ":" in reference else Path(reference).name or reference


def requested_evaluation(
    models: dict[str, str], *, data: str | None, protocols: Sequence[str], suite: str | None = None, profile: str,
    overrides: Sequence[str], run_dir: str | None, home: Path,
) -> Evaluation:  # fmt: skip
    """An evaluation of models on a dataset, or on those of a suite."""
    of_stage, of_profile = split_profile_overrides(overrides)
    chosen, placement = load_profile(profile, of_profile)
    models, plan = _models_and_suite(models, data, protocols, suite, home)
    sources = {name: described_model(reference, home, instead=INSTEAD) for name, reference in models.items()}
    if plan:
        name = Path(suite).stem if suite else FORGETTING
        indexes, asked, unavailable = _suite_datasets(plan, home)
        of_stage = [*_as_overrides(plan.settings), *of_stage]
    else:
        name, indexes, asked, unavailable = *_one_dataset(data, protocols, sources, home), {}
    groups = {key: one.group for key, one in plan.datasets.items()} if plan else {}
    raw = {
        "models": models, "unavailable": unavailable,
        "datasets": {
            key: {"path": str(index.directory), "protocols": asked[key], "group": groups.get(key)}
            for key, index in indexes.items()
        },
    }  # fmt: skip
    settings_of_profile = [one for one in overrides if one.startswith("profile.")]
    evaluation = Evaluation(name, raw, of_stage, sources, indexes, (), chosen, placement, home, run_dir, profile,
                            settings_of_profile)  # fmt: skip
    evaluation = _without_unscorable(evaluation, leave_out=bool(suite))
    trainings = tuple(
        _training(model, key, protocol, evaluation, plan)
        for model in models for key in evaluation.indexes for protocol in asked[key] if NEEDS[protocol].recipe
    )  # fmt: skip
    return replace(evaluation, trainings=trainings)


def evaluation_run(
    models: dict[str, str], *, data: str | None, protocols: Sequence[str], profile: str, overrides: Sequence[str],
    run_dir: str | None, home: Path,
) -> RunDirectory:  # fmt: skip
    """An evaluation that trains nothing, on disk and ready to submit."""
    evaluation = requested_evaluation(
        models, data=data, protocols=protocols, profile=profile, overrides=overrides, run_dir=run_dir, home=home
    )
    if evaluation.trainings:
        raise InputError(f"protocol {evaluation.trainings[0].name} trains a probe first; `vit evaluate` does that")
    return evaluation.write()


def _models_and_suite(
    models: dict[str, str], data: str | None, protocols: Sequence[str], suite: str | None, home: Path
) -> tuple[dict[str, str], SuiteConfig | None]:
    """The models with those that a suite names, and the suite: a file's, or what forgetting-v1 stands for."""
    if FORGETTING in protocols:
        return _before_and_after(models, data, protocols, suite, home)
    if suite and (data or protocols):
        raise InputError(f"--suite {suite}: the suite names datasets and protocols; leave --data and --protocol out")
    plan = _read_suite(suite) if suite else None
    if plan and (twice := models.keys() & plan.models.keys()):
        raise InputError(f"--suite {suite}: models: {twice.pop()} is what the command's MODEL is called; rename it")
    return models | (plan.models if plan else {}), plan


def _one_dataset(
    data: str | None, protocols: Sequence[str], sources: Mapping[str, ModelSource], home: Path
) -> tuple[str, dict[str, DatasetIndex], dict[str, list[str]]]:
    """The name of a dataset, and by it its index and the protocols; by default all that the models allow."""
    index = dataset(data, home)
    if index is None:
        raise InputError("no data: name a dataset directory with --data, or several in a file with --suite")
    asked = _known(protocols) or _applicable(sources, index)
    require_heads(asked, sources, index)
    return index.directory.name, {index.directory.name: index}, {index.directory.name: asked}


def _before_and_after(
    models: dict[str, str], data: str | None, protocols: Sequence[str], suite: str | None, home: Path
) -> tuple[dict[str, str], SuiteConfig]:
    """The model's parent and itself, and the parent's datasets; InputError where it was not pretrained further."""
    if len(protocols) > 1 or data or suite:
        raise InputError(f"protocol {FORGETTING} names data and protocols itself; leave --data and others out")
    (reference,) = models.values()
    parent = described_model(reference, home, instead=INSTEAD).lineage.get("parent")
    if parent is None:
        raise InputError(f"MODEL `{reference}`: was initialised from no other model, so there is nothing to forget")
    before = described_model(parent, home, instead=INSTEAD)
    datasets = before.lineage.get("datasets") or []
    if not datasets:
        raise InputError(
            f"MODEL `{parent}`, from which `{reference}` was initialised, does not say what data it learned from; "
            "score both by --suite on a dataset of yours"
        )
    suite_config = SuiteConfig.model_validate({
        "datasets": {
            Path(one["path"]).name + (f"-{number}" if number else ""): {"data": one["path"]}
            for number, one in enumerate(datasets)
        },
        "protocols": list(OF_FORGETTING),
    })  # fmt: skip
    return {"before": parent, "after": reference}, suite_config


def _read_suite(path: str) -> SuiteConfig:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"--suite {path}: no such file")
    suite = validate(SuiteConfig, read_yaml(file), str(file))
    named = {"protocols": suite.protocols, "training": tuple(suite.training)}
    named |= {f"datasets.{name}.protocols": one.protocols for name, one in suite.datasets.items()}
    for key, protocols in named.items():
        for protocol in protocols:
            if protocol not in PROTOCOLS:
                near = near_matches(protocol, PROTOCOLS)
                raise InputError(f"{file}: {key}: protocol `{protocol}` does not exist; {near}")
    for protocol in suite.training:
        if not NEEDS[protocol].recipe:
            raise InputError(f"{file}: training: protocol `{protocol}` trains nothing; leave it out")
    return suite


def _suite_datasets(suite: SuiteConfig, home: Path) -> tuple[dict, dict, dict[str, str]]:
    """Indexes and protocols by dataset, and why others cannot be read."""
    indexes, asked, unavailable = {}, {}, {}
    for name, one in suite.datasets.items():
        try:
            indexes[name], asked[name] = dataset(one.data, home), list(one.protocols or suite.protocols)
        except (InputError, FaultError) as error:
            unavailable[name] = _in_one_line(error)
    return indexes, asked, unavailable


def _in_one_line(error: InputError | FaultError) -> str:
    return "; ".join(error.problems) if isinstance(error, InputError) else str(error)


def _without_unscorable(evaluation: Evaluation, *, leave_out: bool) -> Evaluation:
    """The evaluation without the datasets that cannot be scored, if those are left out: InputError where none is left.

    Otherwise the first of them is an InputError.
    """
    config, unavailable = evaluation.config(), dict(evaluation.raw["unavailable"])
    for name, index in evaluation.indexes.items():
        try:
            require_scorable(index, config.datasets[name].protocols, config.splits, evaluation.sources)
        except InputError as error:
            if not leave_out:
                raise
            unavailable[name] = _in_one_line(error)
    indexes = {name: index for name, index in evaluation.indexes.items() if name not in unavailable}
    if not indexes:
        raise InputError(*(f"{name}: {reason}" for name, reason in unavailable.items()))
    datasets = {name: one for name, one in evaluation.raw["datasets"].items() if name in indexes}
    return replace(evaluation, indexes=indexes, raw=evaluation.raw | {"datasets": datasets, "unavailable": unavailable})


def _known(protocols: Sequence[str]) -> list[str]:
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise InputError(
                f"protocol `{protocol}` does not exist; {near_matches(protocol, [*PROTOCOLS, FORGETTING])}"
            )
    return list(dict.fromkeys(protocols))


def _applicable(sources: Mapping[str, ModelSource], index: DatasetIndex) -> list[str]:
    """Those by default, without the models' own heads where one has none or another's classes; the dense ones where
    there are masks or boxes instead of labels."""
    if not index.num_classes and (index.mask_classes or index.box_classes):
        has = {"segment-linear-v1": index.mask_classes, "detect-linear-v1": index.box_classes}
        return [protocol for protocol, classes in has.items() if classes]
    if index.label_sets is not None:
        return ["classify-v1"]
    with_heads = all(
        source.num_classes and not unknown_classes(source, index.classes) for source in sources.values()
    )  # fmt: skip
    learns = bool(LEARNED_FROM in index.splits and index.num_samples(LEARNED_FROM))
    return [one for one in BY_DEFAULT if (with_heads if NEEDS[one].head else learns)] or list(BY_DEFAULT)


def _training(
    model: str, name: str, protocol: str, evaluation: Evaluation, suite: SuiteConfig | None
) -> Training:  # fmt: skip
    """The training that a protocol asks for; settings of a suite other than the protocol's own are in its name."""
    settings = _as_overrides(suite.training.get(protocol, {}) if suite else {})
    prepared, chosen = checked_training(
        "finetune", NEEDS[protocol].recipe, data=str(evaluation.indexes[name].directory),
        profile=evaluation.where, overrides=[*settings, *evaluation.of_profile], home=evaluation.home, rehearse="never",
        model=evaluation.sources[model].reference,
    )  # fmt: skip
    called = "+".join([protocol, *(setting.replace("/", ":") for setting in settings)])  # `/` parts a metric's name
    return Training(model, name, called, prepared, chosen)


def _as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """As `--set` gives them: a value in JSON is the same value in YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
