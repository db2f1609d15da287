"""From what a person asked (recipe, data, profile, settings) to a training run on disk.

One code path and one error text for the command line and the flows, as in all of this folder: nothing is written before
everything is valid. Torch-free, and Prefect is not imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cluster.job import JobState
from cluster.profile import Profile
from flows.control.submission import launcher_of
from flows.profiles import load_profile, profile_text
from flows.requests.named import Data, built_in_dataset, named_model, training_sources
from flows.requests.stage import write_stage
from pipeline.config.recipe import (
    apply_overrides,
    parse_overrides,
    read_yaml,
    recipe_names,
    recipe_path,
    split_profile_overrides,
)
from pipeline.config.stages import SequenceConfig
from pipeline.errors import InputError, near_matches
from pipeline.forecast.outlook import Outlook, outlook
from pipeline.loading.sources import Sources
from pipeline.preparation.memory import memory_shortage
from pipeline.preparation.placement import Placement, require_every_size
from pipeline.preparation.rehearsal import (
    days_here,
    length_set_by_hand,
    prepare_rehearsal,
)
from pipeline.preparation.training import PreparedRun, prepare_training
from pipeline.preparation.write import has_begun, is_same_profile, run_path, write_run
from pipeline.registry.locate import ModelSource
from pipeline.run_directory import RunDirectory

Rehearse = Literal["auto", "always", "never"]


def recipe_of(encoder: str, objective: str) -> str:
    """The pretraining recipe of an encoder and an objective; InputError with the near ones where there is none."""
    name = f"pretrain_{objective}_{encoder}"
    if name not in recipe_names():
        pretraining = [known for known in recipe_names() if known.startswith("pretrain_")]
        raise InputError(
            f"objective `{objective}` with encoder `{encoder}`: no recipe {name}; {near_matches(name, pretraining)}"
        )
    return name


def training_run(
    stage: str, recipe: str, *, data: Data, profile: str, overrides: Sequence[str], run_dir: str | None,
    home: Path, rehearse: Rehearse = "auto", model: str | None = None,
) -> RunDirectory:  # fmt: skip
    """A training run, or its rehearsal, on disk and ready to submit."""
    prepared, chosen = checked_training(
        stage, recipe, data=data, profile=profile, overrides=overrides, home=home, rehearse=rehearse, model=model
    )
    return written(prepared, chosen, run_dir, home)


def checked_training(
    stage: str, recipe: str, *, data: Data, profile: str, overrides: Sequence[str], home: Path,
    rehearse: Rehearse = "auto", model: str | None = None,
) -> tuple[PreparedRun, Profile]:  # fmt: skip
    """A training run that is valid and fits where its profile puts it, not yet written; and the profile."""
    of_recipe, of_profile = split_profile_overrides(overrides)
    chosen, placement = load_profile(profile, of_profile)
    prepared = prepared_training(
        stage, recipe, data=data, placement=placement, overrides=of_recipe, home=home, rehearse=rehearse, model=model
    )
    if (shortage := memory_shortage(prepared, placement)) is not None:
        raise InputError(shortage)
    return prepared, chosen


def written(prepared: PreparedRun, profile: Profile, run_dir: str | None, home: Path) -> RunDirectory:
    """A prepared training on disk, where it was asked for or in the home."""
    path = run_path(prepared, home, run_dir)
    _require_no_job_elsewhere(RunDirectory(path), profile_text(profile))
    said = outlook(prepared.config, prepared.plan, home, profile.model_dump(mode="json"), path)
    prepared.notes.extend(said.notes)
    run = write_run(prepared, path, profile_text(profile))
    if not has_begun(run):
        _write_outlook(said, run)
    _make_known(run, home)
    return run


def _write_outlook(said: Outlook, run: RunDirectory) -> None:
    try:
        said.write(run)
    except OSError as error:
        raise InputError(f"{run.path}: the run directory cannot be written: {error.strerror}") from None


def _require_no_job_elsewhere(run: RunDirectory, text: str) -> None:
    """InputError where a job of the run lives under another profile: its plan and script are those it will start by."""
    if not run.job_file.is_file() or not run.profile_file.is_file():
        return
    if is_same_profile(run.profile_file.read_text(), text):
        return
    launcher = launcher_of(run)
    job = launcher.find(run.path)
    if job is not None and (state := launcher.state(job)) is not JobState.ENDED:
        raise InputError(
            f"{run.path}: its {job.kind} job {job.id.partition(':')[0]} is {state.value} under another profile; "
            f"stop it by `vit stop {run.path}`, then `vit resume {run.path} --set profile.K=V`"
        )


def _make_known(run: RunDirectory, home: Path) -> None:
    """A run elsewhere gets a link in the home, so that `vit runs`, `vit reconcile` and a cancel find it."""
    folder = home / "runs"
    if run.path.parent.resolve() == folder.resolve():
        return
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / run.key
    if not link.is_symlink():
        link.symlink_to(run.path.resolve())


def prepared_training(
    stage: str, recipe: str, *, data: Data, placement: Placement, overrides: Sequence[str], home: Path,
    rehearse: Rehearse, model: str | None,
) -> PreparedRun:  # fmt: skip
    recipe_path(recipe)  # its error comes first
    source = named_model(_model_reference(stage, recipe, overrides, model), home)
    teacher = _named_teacher(recipe, overrides, home)
    sources = training_sources(data, home)
    built_in = sources is None
    if built_in and rehearse == "never":
        raise InputError(
            "no data: name a dataset directory with --data (or `vit up --data`), or rehearse on built-in images"
        )
    if built_in:
        recipe_path(recipe), parse_overrides(overrides)  # their errors come before anything is written
        sources = Sources((built_in_dataset(home),))
    full = prepare_training(stage, recipe, overrides, sources, placement, source, teacher)
    if built_in:
        full.notes.append("no --data: these are the built-in images of handwritten digits")
    if _should_rehearse(rehearse, built_in, full, overrides, placement):
        full = prepare_rehearsal(
            stage, recipe, overrides, sources, placement, source, full, built_in_data=built_in, teacher=teacher
        )
    if placement.nodes_range is not None:
        require_every_size(full.config, placement, *placement.nodes_range)
    return full


def _model_reference(stage: str, recipe: str, overrides: Sequence[str], model: str | None) -> str | None:
    """Where weights come from: the command's MODEL, else `initialise_from` of the settings, else of the recipe."""
    setting = parse_overrides(overrides).get("initialise_from")
    if model is not None and setting is not None:
        raise InputError(f"--set initialise_from={setting}: the model is already named: {model}")
    reference = model or setting or read_yaml(recipe_path(recipe)).get("initialise_from")
    if stage == "finetune" and reference is None:
        raise InputError(f"{recipe}: which model? Name it, for example --set initialise_from=RUN")
    return reference


def _named_teacher(recipe: str, overrides: Sequence[str], home: Path) -> ModelSource | None:
    """The located MODEL that the run learns from; None where its objective is no distillation."""
    try:
        return named_model(_teacher_reference(recipe, overrides), home)
    except InputError as error:
        raise InputError(*(f"objective.teacher: {problem}" for problem in error.problems)) from None


def _teacher_reference(recipe: str, overrides: Sequence[str]) -> str | None:
    """The MODEL that the run learns from, where its objective is distillation."""
    raw = apply_overrides(read_yaml(recipe_path(recipe)), parse_overrides(overrides))
    objective = raw.get("objective")
    if not isinstance(objective, dict) or objective.get("kind") != "distill":
        return None
    return objective.get("teacher") if isinstance(objective.get("teacher"), str) else None


def _should_rehearse(
    rehearse: str, built_in: bool, full: PreparedRun, overrides: Sequence[str], where: Placement
) -> bool:
    if rehearse != "auto":
        return rehearse == "always"
    if length_set_by_hand(overrides):
        return False
    if built_in:
        return True
    return days_here(full, where) is not None


def sequence_run(
    runs: Sequence[RunDirectory], *, profile: str, overrides: Sequence[str], home: Path, run_dir: str | None = None
) -> RunDirectory:
    """Several prepared training runs in one set of processes."""
    chosen, placement = load_profile(profile, split_profile_overrides(overrides)[1])
    config = SequenceConfig(runs=tuple(str(run.path) for run in runs))
    plan = {"format_version": 1, "stage": "sequence", **placement.as_plan(), "precision": placement.precision("bf16")}
    return write_stage(config, plan, "sequence", run_dir, home, chosen)
