"""The bodies of the command line's commands; each returns an exit code and reports through `say`."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.profile import LocalProfile
from flows.command_line.progress_bar import ingest_display
from flows.command_line.runs import carried_out, controlled, finished, interrupts
from flows.control.jobs import control
from flows.control.progress import certificate_lines, ingest_words
from flows.control.submission import launcher_of, request_of, runs_here
from flows.home import home_directory
from flows.planning import learned_lines, measured, plan_lines
from flows.profiles import load_profile
from flows.requests.embedding import embedding_run
from flows.requests.evaluation import model_name, requested_evaluation
from flows.requests.inspection import inspection_run
from flows.requests.registration import registration_run
from flows.requests.training import prepared_training, training_run
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import (
    apply_overrides,
    parse_overrides,
    read_yaml,
    recipe_path,
    split_profile_overrides,
    validate,
)
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, InputError
from pipeline.ingestion.build import ingest as build_dataset
from pipeline.ingestion.making import IngestError
from pipeline.preparation.memory import lowest_stage_that_fits, memory_shortage
from pipeline.run_directory import RunDirectory, write_atomic
from pipeline.shards.check import checked_index

Say = Callable[..., None]


def ingest_command(source: str, dest: str, overrides: list[str], say: Say) -> int:
    config = validate(IngestConfig, apply_overrides({}, parse_overrides(overrides)), "--set")
    try:
        with _terminated_like_interrupted(), ingest_display(say) as progress:
            report = build_dataset(source, dest, config, progress=progress)
    except IngestError as error:
        say(str(error), error=True)
        return EXIT_FAILED
    except KeyboardInterrupt as stopped:
        say(f"{stopped if str(stopped) else 'stopped'}; the same command goes on", error=True)
        return EXIT_STOPPED
    say(ingest_words(report))
    for line in certificate_lines(report):
        say(line)
    return EXIT_DONE


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def check_command(dataset: str, full: bool, say: Say) -> int:
    index, faults = checked_index(dataset, full)
    for fault in faults:
        say(fault)
    if index is not None and not faults:
        say(f"{dataset}: sound{'' if full else ' (sizes and tables; --full also reads every image)'}")
        say(f"fingerprint {index.fingerprint}")
        if index.tombstones:
            say(f"on its tombstone list: {len(index.tombstones)} samples, which training and validation leave out")
    return EXIT_FAILED if faults else EXIT_DONE


def plan_command(
    recipe: str, data: list[str], profile: str, overrides: list[str], directory: str | None, say: Say
) -> int:
    home = home_directory(directory)
    of_recipe, of_profile = split_profile_overrides(overrides)
    chosen, placement = load_profile(profile, of_profile)
    stage = read_yaml(recipe_path(recipe)).get("stage")
    prepared = prepared_training(
        stage, recipe, data=data, placement=placement, overrides=of_recipe, home=home, rehearse="never", model=None
    )
    for line in plan_lines(prepared, profile, lowest_stage_that_fits(prepared, placement)):
        say(line)
    code, lines = measured(prepared, chosen)
    for line in [*lines, *learned_lines(prepared, chosen, home)]:
        say(line)
    if (shortage := memory_shortage(prepared, placement)) is not None:
        say(f"does not fit here: {shortage}")
        return EXIT_INPUT
    return code


def training_command(
    stage: str, recipe: str, *, data: list[str], profile: str, overrides: list[str], dry_run: bool,
    rehearse: bool | None, run_dir: str | None, directory: str | None, model: str | None, watch: bool, say: Say,
) -> int:  # fmt: skip
    home = home_directory(directory)
    choice = {None: "auto", True: "always", False: "never"}[rehearse]
    run = training_run(
        stage, recipe, data=data, profile=profile, overrides=overrides, run_dir=run_dir, home=home,
        rehearse=choice, model=model,
    )  # fmt: skip
    if dry_run:
        return _dry_run(run, say)
    return carried_out(run, home, say, watch=watch)


def _dry_run(run: RunDirectory, say: Say) -> int:
    """Write and show what would be submitted, and submit nothing."""
    folder = run.path / "submit"
    folder.mkdir(exist_ok=True)
    shown = [run.config_file, run.plan_file]
    for name, text in launcher_of(run).render(request_of(run)).items():
        write_atomic(folder / name, text)
        shown.append(folder / name)
    for path in shown:
        say(f"# {path}\n{path.read_text()}")
    return _as_submitted(run, say)


def _as_submitted(run: RunDirectory, say: Say) -> int:
    """What a submission would meet, of places that can tell beforehand: 2 where what was written is itself wrong."""
    wrong, elsewhere = launcher_of(run).objections(request_of(run))
    for line in [*wrong, *(f"would not be submitted from here: {line}" for line in elsewhere)]:
        say(line, error=True)
    return EXIT_INPUT if wrong else EXIT_DONE


def sweep_command(
    recipe: str, data: list[str], profile: str, overrides: list[str], directory: str | None, say: Say
) -> int:  # fmt: skip
    from flows.grids.sweeping import carry_out, prepared_sweep

    home = home_directory(directory)
    sweep = prepared_sweep(recipe, data=data, profile=profile, overrides=overrides, home=home)
    with interrupts(runs_here(sweep.runs[0])) as (cancelled, detached):
        code, message = carry_out(
            sweep, say,
            lambda run, told: control(run, home, told, cancelled=cancelled, detached=detached, introduced=True),
        )  # fmt: skip
    say(message)
    return code


def ladder_command(
    recipe: str, data: list[str], profile: str, overrides: list[str], dry_run: bool, directory: str | None, say: Say
) -> int:  # fmt: skip
    from flows.grids import laddering

    home = home_directory(directory)
    plan = laddering.planned_ladder(recipe, data=data, profile=profile, overrides=overrides, home=home)
    if dry_run:
        for line in laddering.plan_lines(plan):
            say(line)
        return EXIT_DONE
    with interrupts(isinstance(plan.profile, LocalProfile)) as (cancelled, detached):
        code, message = laddering.carry_out(
            plan, say,
            lambda run, told: control(run, home, told, cancelled=cancelled, detached=detached, introduced=True),
        )  # fmt: skip
    say(message)
    return code


def study_command(file: str, overrides: list[str], dry_run: bool, directory: str | None, say: Say) -> int:
    from flows.grids.study_table import planned_study_lines
    from flows.grids.studying import carry_out
    from flows.requests.study import requested_study

    home = home_directory(directory)
    try:
        study = requested_study(file, overrides=overrides, home=home, report=say)
    except KeyboardInterrupt:
        say("stopped while cells were prepared: nothing was written", error=True)
        return 130
    if dry_run:
        for line in planned_study_lines(study):
            say(line)
        return EXIT_DONE
    with interrupts(isinstance(study.profile, LocalProfile)) as (cancelled, detached):
        code, message = carry_out(
            study, say,
            lambda run, told: control(run, home, told, cancelled=cancelled, detached=detached, introduced=True),
        )  # fmt: skip
    say(message)
    return code


def evaluate_command(
    model: str, data: str | None, protocols: list[str], suite: str | None, profile: str, overrides: list[str],
    run_dir: str | None, directory: str | None, say: Say,
) -> int:  # fmt: skip
    from flows.evaluating import carry_out, difference_lines, score_lines, table_lines

    home = home_directory(directory)
    evaluation = requested_evaluation(
        {model_name(model): model}, data=data, protocols=protocols, suite=suite, profile=profile, overrides=overrides,
        run_dir=run_dir, home=home,
    )  # fmt: skip
    conclusion = carry_out(evaluation, say, lambda run, told: controlled(run, home, told))
    metrics = conclusion.result.get("metrics", {}) if conclusion.result.get("stage") == "evaluate" else {}
    if len(metrics) == 1 and not suite:
        for line in score_lines(conclusion.result):
            say(line)
    elif metrics:
        for line in [*table_lines(conclusion.result), *difference_lines(conclusion.result)]:
            say(line)
    if metrics:
        say(f"the same with intervals: {conclusion.run.path / 'table.csv'}; per class, confusions, worst images: "
            f"{conclusion.run.path / 'scores'}")  # fmt: skip
    return finished(conclusion, say)


def embed_command(
    model: str, dest: str, data: str | None, queries: list[str], profile: str, overrides: list[str],
    directory: str | None, say: Say,
) -> int:  # fmt: skip
    home = home_directory(directory)
    run = embedding_run(model, dest, data=data, queries=queries, profile=profile, overrides=overrides, home=home)
    conclusion = controlled(run, home, say)
    result = conclusion.result
    if conclusion.code == EXIT_DONE:
        say(f"{result['images']:,} images as {result['dimensions']:,} numbers each, {result['made']:,} of them now: "
            f"{result['destination']}/*.parquet")  # fmt: skip
    for query, neighbours in result.get("nearest", {}).items():
        say(f"most like {query}:")
        for one in neighbours:
            where = f"{one['key']}  ({one['split']}, {one['shard']})"
            say(f"{one['similarity']:.4f}  {one['class_name'] or '-':<20} {where}")
    return finished(conclusion, say)


def register_command(model: str, name: str, overrides: list[str], directory: str | None, say: Say) -> int:
    home = home_directory(directory)
    conclusion = controlled(registration_run(model, name, home=home, overrides=overrides), home, say)
    if conclusion.code == EXIT_DONE:
        say(conclusion.result["summary"])
    return finished(conclusion, say)


def inspect_command(model: str, paths: tuple[str, ...], overrides: list[str], directory: str | None, say: Say) -> int:
    if len(paths) < 2:
        raise InputError("vit inspect MODEL IMAGES DEST: name the images, and last the folder for the pictures")
    home = home_directory(directory)
    run = inspection_run(model, paths[:-1], paths[-1], overrides=overrides, home=home)
    conclusion = controlled(run, home, say)
    for title, reason in conclusion.result.get("not_drawn", {}).items():
        say(f"not drawn: {title}: {reason}")
    if conclusion.code == EXIT_DONE:
        say(conclusion.result["tracking"])
        say(f"{len(conclusion.result['pictures'])} pictures: {conclusion.result['page']}")
    return finished(conclusion, say)


def reconcile_command(directory: str | None, say: Say) -> int:
    from flows.orchestration.reconciliation import reconcile_home

    return reconcile_home(home_directory(directory), say)
