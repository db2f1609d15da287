"""From what a person asked (recipe, data, profile, settings) to a run on disk: one code path and one error text for the
command line and the flows. Nothing is written before everything is valid. Torch-free, and Prefect is not imported.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cluster.job import JobState
from cluster.profile import Profile
from flows.control.submission import launcher_of
from flows.home import read_stack, tracking_uri
from flows.profiles import load_profile, profile_text
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import (
    apply_overrides,
    parse_overrides,
    read_yaml,
    recipe_names,
    recipe_path,
    split_profile_overrides,
    validate,
)
from pipeline.config.stages import PROTOCOLS, EvaluateConfig, InspectConfig, RegisterConfig, SequenceConfig
from pipeline.errors import InputError, near_matches
from pipeline.ingestion.build import ingest
from pipeline.inspection.sources import absolute, dataset_of, image_files, require_destination, spread
from pipeline.loading.sources import Sources
from pipeline.preparation.memory import memory_shortage
from pipeline.preparation.placement import Placement, require_every_size
from pipeline.preparation.rehearsal import (
    DAY_SECONDS,
    length_set_by_hand,
    prepare_rehearsal,
    seconds_without_accelerator,
)
from pipeline.preparation.training import PreparedRun, prepare_training
from pipeline.preparation.write import is_same_profile, run_path, write_run
from pipeline.registry.locate import ModelSource, locate_model, require_tracking_server, unregistrable
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.storage.location import is_url

Rehearse = Literal["auto", "always", "never"]
Data = str | Sequence[str] | None  # PATH, or several PATH=WEIGHT


def recipe_of(encoder: str, objective: str) -> str:
    """The pretraining recipe of an encoder and an objective; InputError with the near ones where there is none."""
    name = f"pretrain_{objective}_{encoder}"
    if name not in recipe_names():
        pretraining = [known for known in recipe_names() if known.startswith("pretrain_")]
        raise InputError(
            f"objective `{objective}` with encoder `{encoder}`: no recipe {name}; {near_matches(name, pretraining)}"
        )
    return name


def dataset(path: str | None, home: Path) -> DatasetIndex | None:
    """The dataset at `path`, or the one `vit up --data` was given; None where neither is said."""
    path = path or (read_stack(home) or {}).get("data")
    if not path:
        return None
    return read_index(path if is_url(path) else Path(path).expanduser().absolute(), check_sizes=True)


def training_sources(data: Data, home: Path) -> Sources | None:
    """The datasets to train on, each `PATH` or `PATH=WEIGHT`; by default the one `vit up --data` was given, else None.

    Weights are given to all datasets or to none.
    """
    data = [data] if isinstance(data, str) else data
    if not data:
        index = dataset(None, home)
        return None if index is None else Sources((index,))
    split = [_path_and_weight(one) for one in data]
    without = [path for path, weight in split if weight is None]
    if len(without) not in (0, len(split)):
        raise InputError(f"--data {without[0]}: it has no weight and others do; write --data {without[0]}=WEIGHT")
    indexes = tuple(dataset(path, home) for path, _ in split)
    return Sources(indexes, None if without else tuple(weight for _, weight in split))


def _path_and_weight(data: str) -> tuple[str, float | None]:
    path, equals, weight = data.rpartition("=")
    if not equals or Path(data).expanduser().exists():
        return data, None
    try:
        number = float(weight)
    except ValueError:
        if Path(path).expanduser().exists():
            raise InputError(f"--data {data}: the weight `{weight}` is not a number; write --data {path}=2.5") from None
        return data, None
    if not 0 < number < float("inf"):
        raise InputError(f"--data {data}: the weight {weight} is not above 0; leave the dataset out, or raise it")
    return path, number


def built_in_dataset(home: Path) -> DatasetIndex:
    """Real images that come with scikit-learn, ingested once under the home: what a rehearsal without data reads."""
    destination = home / "data" / "digits"
    if not (destination / "index.json").is_file():
        ingest("sklearn:digits", destination, IngestConfig())
    return read_index(destination, check_sizes=True)


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
    run = write_run(prepared, path, profile_text(profile))
    _make_known(run, home)
    return run


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
    source = initial_model(_model_reference(stage, recipe, overrides, model), home)
    teacher = initial_model(_teacher_reference(recipe, overrides), home)
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
    if _should_rehearse(rehearse, built_in, full, overrides, placement):
        full = prepare_rehearsal(
            stage, recipe, overrides, sources, placement, source, full, built_in_data=built_in, teacher=teacher
        )
    if placement.nodes_range is not None:
        require_every_size(full.config, placement, *placement.nodes_range)
    return full


def initial_model(reference: str | None, home: Path) -> ModelSource | None:
    """The located MODEL; None where none is named."""
    return None if reference is None else locate_model(reference, tracking_uri=tracking_uri(home), home=home)


def _model_reference(stage: str, recipe: str, overrides: Sequence[str], model: str | None) -> str | None:
    """Where weights come from: the command's MODEL, else `initialise_from` of the settings, else of the recipe."""
    setting = parse_overrides(overrides).get("initialise_from")
    if model is not None and setting is not None:
        raise InputError(f"--set initialise_from={setting}: the model is already named: {model}")
    reference = model or setting or read_yaml(recipe_path(recipe)).get("initialise_from")
    if stage == "finetune" and reference is None:
        raise InputError(f"{recipe}: which model? Name it, for example --set initialise_from=RUN")
    return reference


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
    if not where.here:  # its processors are not timed on this one
        return False
    return where.accelerators_per_node == 0 and seconds_without_accelerator(full) > DAY_SECONDS


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
    sources = {name: initial_model(reference, home) for name, reference in models.items()}
    for name, source in sources.items():
        if source.encoder is None:
            raise InputError(
                f"MODEL `{models[name]}`: weights alone do not say which encoder they fit; "
                "evaluate a run or a registered model"
            )
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
    return _write_stage(config, plan, f"evaluate-{index.directory.name}", run_dir, home, chosen)


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


def registration_run(model: str, name: str, *, home: Path, evaluations: Sequence[str] = ()) -> RunDirectory:
    """A registration, on disk and ready to submit; always on this machine, in one process."""
    chosen, placement = load_profile("local")
    source = locate_model(model, tracking_uri=tracking_uri(home), home=home)
    if source.encoder is None:
        raise InputError(f"MODEL `{model}`: weights alone do not say which encoder they fit; register a run")
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
    return _write_stage(config, plan, f"register-{name}", None, home, chosen)


def inspection_run(
    model: str, images: Sequence[str], destination: str, *, overrides: Sequence[str], home: Path
) -> RunDirectory:
    """Pictures of what a model learned, on disk and ready to submit; always on this machine, in one process."""
    of_stage, of_profile = split_profile_overrides(overrides)
    chosen, placement = load_profile("local", of_profile)
    source = locate_model(model, tracking_uri=tracking_uri(home), home=home)
    if source.encoder is None:
        raise InputError(f"MODEL `{model}`: weights alone do not say which encoder they fit; inspect a run")
    if source.mean is None or source.std is None:
        raise InputError(f"MODEL `{model}`: it does not say how its images were normalised; inspect its run")
    raw = {
        "model": source.reference, "source": [absolute(path) for path in images], "destination": absolute(destination),
        "tracking_uri": tracking_uri(home),
    }  # fmt: skip
    settings = parse_overrides(of_stage)
    config = validate(InspectConfig, apply_overrides(raw, settings), "--set", settings.keys())
    if config.mask is not None:
        config = config.model_copy(update={"mask": _mask(config.mask, source)})
    require_destination(Path(config.destination))
    plan = {
        "format_version": 1, "stage": "inspect", **placement.single().as_plan(), "source": source.as_dict(),
        **_images_to_inspect(config),
    }  # fmt: skip
    return _write_stage(config, plan, f"inspect-{Path(config.destination).name}", None, home, chosen)


def _images_to_inspect(config: InspectConfig) -> dict:
    """Of a plan: the dataset and its split, or the files that were chosen."""
    if (directory := dataset_of(config.source)) is None:
        if config.split is not None:
            raise InputError(f"--set split={config.split}: only a dataset has splits, IMAGES are files; leave it out")
        return {"images": spread(image_files(config.source), config.images)}
    index = read_index(directory, check_sizes=True)
    split = config.split or next(name for name in ("test", "validation", "train") if name in index.splits)
    index.shards(split)
    return {"data": {"path": str(index.directory), "fingerprint": index.fingerprint}, "split": split}


def _mask(mask: str, source: ModelSource) -> str:
    """Where the mask is, absolute. InputError where it is not, or the model cannot fill in what it covers."""
    path = Path(mask).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"--set mask={mask}: there is no such file")
    if source.kind != "checkpoint" or source.objective != "mae":
        raise InputError(
            f"--set mask={mask}: MODEL `{source.reference}` has no decoder that fills in; name a run of objective mae"
        )
    return str(path)


def sequence_run(runs: Sequence[RunDirectory], *, profile: str, overrides: Sequence[str], home: Path) -> RunDirectory:
    """Several prepared training runs in one set of processes."""
    chosen, placement = load_profile(profile, split_profile_overrides(overrides)[1])
    config = SequenceConfig(runs=tuple(str(run.path) for run in runs))
    plan = {"format_version": 1, "stage": "sequence", **placement.as_plan(), "precision": placement.precision("bf16")}
    return _write_stage(config, plan, "sequence", None, home, chosen)


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


def _write_stage(config, plan: dict, name: str, run_dir: str | None, home: Path, profile: Profile) -> RunDirectory:
    prepared = PreparedRun(name, config, plan)
    return write_run(prepared, _fresh_path(prepared, home, run_dir), profile_text(profile))


def _fresh_path(prepared: PreparedRun, home: Path, run_dir: str | None) -> Path:
    """A stage that measures or publishes is done anew each time: the first free number behind its name."""
    if run_dir is not None:
        return Path(run_dir).absolute()
    folder, number = home / "runs", 1
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        path = folder / f"{prepared.name}-{number:03d}"
        try:
            path.mkdir()  # taken at once, so that two commands never share one
            return path
        except FileExistsError:
            number += 1
