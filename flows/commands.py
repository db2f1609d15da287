"""The bodies of the command line's commands; each returns an exit code and reports through `say`."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cluster.job import JobState
from cluster.local import LocalLauncher
from flows import requests
from flows.home import home_directory
from flows.jobs import STOP_GRACE_SECONDS, Conclusion, conclude, control, stop_on_interrupt
from flows.planning import measured, plan_lines
from flows.progress import ingest_progress, ingest_words
from pipeline.budget import hours_of
from pipeline.config.ingest import IngestConfig
from pipeline.config.recipe import (
    apply_overrides,
    parse_overrides,
    read_yaml,
    recipe_path,
    split_profile_overrides,
    validate,
)
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED, InputError, near_matches
from pipeline.ingestion.build import IngestError
from pipeline.ingestion.build import ingest as build_dataset
from pipeline.liveness import running_elsewhere
from pipeline.preparation.memory import lowest_stage_that_fits, memory_shortage
from pipeline.preparation.resume import change_run
from pipeline.run_directory import RunDirectory, read_json, write_atomic, write_json
from pipeline.shards.check import check_dataset
from pipeline.words import number_in_words

Say = Callable[..., None]


def ingest_command(source: str, dest: str, overrides: list[str], say: Say) -> int:
    config = validate(IngestConfig, apply_overrides({}, parse_overrides(overrides)), "--set")
    try:
        report = build_dataset(source, Path(dest), config, progress=ingest_progress(say))
    except IngestError as error:
        say(str(error), error=True)
        return EXIT_FAILED
    say(ingest_words(report))
    return EXIT_DONE


def check_command(dataset: str, full: bool, say: Say) -> int:
    faults = check_dataset(dataset, full)
    for fault in faults:
        say(fault)
    if not faults:
        say(f"{dataset}: sound{'' if full else ' (sizes and tables; --full also reads every image)'}")
    return EXIT_FAILED if faults else EXIT_DONE


def plan_command(
    recipe: str, data: list[str], profile: str, overrides: list[str], directory: str | None, say: Say
) -> int:
    home = home_directory(directory)
    of_recipe, of_profile = split_profile_overrides(overrides)
    chosen, placement = requests.load_profile(profile, of_profile)
    stage = read_yaml(recipe_path(recipe)).get("stage")
    prepared = requests.prepared_training(
        stage, recipe, data=data, placement=placement, overrides=of_recipe, home=home, rehearse="never", model=None
    )
    for line in plan_lines(prepared, profile, lowest_stage_that_fits(prepared, placement)):
        say(line)
    code, lines = measured(prepared, chosen)
    for line in lines:
        say(line)
    if (shortage := memory_shortage(prepared, placement)) is not None:
        say(f"does not fit here: {shortage}")
        return EXIT_INPUT
    return code


def training_command(
    stage: str, recipe: str, *, data: list[str], profile: str, overrides: list[str], dry_run: bool,
    rehearse: bool | None, run_dir: str | None, directory: str | None, model: str | None, say: Say,
) -> int:  # fmt: skip
    home = home_directory(directory)
    choice = {None: "auto", True: "always", False: "never"}[rehearse]
    run = requests.training_run(
        stage, recipe, data=data, profile=profile, overrides=overrides, run_dir=run_dir, home=home,
        rehearse=choice, model=model,
    )  # fmt: skip
    if dry_run:
        return _dry_run(run, say)
    return _finish(_controlled(run, home, say), say)


def _dry_run(run: RunDirectory, say: Say) -> int:
    """Write and show what would be submitted, and submit nothing."""
    script = run.path / "submit" / "job.sh"
    script.parent.mkdir(exist_ok=True)
    text = f"#!/bin/sh\nexec {sys.executable} -m pipeline.launch {run.path}\n"
    write_atomic(script, text)
    for path in (run.config_file, run.plan_file, script):
        say(f"# {path}\n{path.read_text()}")
    return EXIT_DONE


def _controlled(run: RunDirectory, home: Path, say: Say) -> Conclusion:
    """`control` in the foreground, reporting to Prefect where its API answers; Ctrl-C stops with a checkpoint."""
    cancelled = threading.Event()
    with stop_on_interrupt(cancelled):
        from flows.mirror import mirrored

        work = partial(control, run, home, say, cancelled=cancelled)
        return mirrored(run, home, lambda observe: work(observe=observe), cancelled)


def _finish(conclusion: Conclusion, say: Say) -> int:
    say(conclusion.message, error=conclusion.code not in (EXIT_DONE, EXIT_STOPPED))
    if conclusion.code == EXIT_STOPPED:
        say(f"go on with: vit resume {conclusion.run.path}")
    return conclusion.code


def evaluate_command(
    model: str, data: str | None, protocols: list[str], profile: str, overrides: list[str], run_dir: str | None,
    directory: str | None, say: Say,
) -> int:  # fmt: skip
    home = home_directory(directory)
    run = requests.evaluation_run(
        {"model": model},
        data=data,
        protocols=protocols,
        profile=profile,
        overrides=overrides,
        run_dir=run_dir,
        home=home,
    )
    conclusion = _controlled(run, home, say)
    for key, value in conclusion.result.get("metrics", {}).get("model", {}).items():
        say(f"{key:<50} {value:.4f}")
    return _finish(conclusion, say)


def register_command(model: str, name: str, directory: str | None, say: Say) -> int:
    home = home_directory(directory)
    conclusion = _controlled(requests.registration_run(model, name, home=home), home, say)
    if conclusion.code == EXIT_DONE:
        say(conclusion.result["summary"])
    return _finish(conclusion, say)


def find_run(name: str, home: Path) -> RunDirectory:
    """A run by path, or by its name under the home."""
    path = Path(name).expanduser()
    if not (path / "config.yaml").is_file() and (home / "runs" / name / "config.yaml").is_file():
        path = home / "runs" / name
    if not (path / "config.yaml").is_file():
        known = [entry.name for entry in (home / "runs").glob("*")]
        raise InputError(f"run `{name}`: no such run directory; {near_matches(name, known)}")
    return RunDirectory(path.absolute())


def runs_command(directory: str | None, say: Say) -> int:
    home, launcher = home_directory(directory), LocalLauncher()
    for path in sorted((home / "runs").glob("*/config.yaml"), key=lambda entry: entry.stat().st_mtime):
        run = RunDirectory(path.parent)
        newest = run.newest_checkpoint()
        step = f"step {newest.step}" if newest else "no checkpoint"
        hours, best = number_in_words(hours_of(run)), (read_json(run.result_file) or {}).get("best")
        words = f"  best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
        say(f"{run.path.name:<48} {run_state(run, launcher):<10} {step:<16} {hours} rank-hours{words}")
    return EXIT_DONE


def run_state(run: RunDirectory, launcher: LocalLauncher) -> str:
    """done, running, stopped, failed, lost or new: from the run directory and the job alone."""
    if run.result_file.is_file():
        return "done"
    job = launcher.find(run.path)
    if job is None:
        return "new"
    if launcher.state(job) is JobState.RUNNING or running_elsewhere(run):
        return "running"
    verdict = run.attempt(job.attempt).verdict()
    if verdict is None:
        return "lost"
    return "stopped" if verdict["code"] == EXIT_STOPPED else "failed"


def logs_command(name: str, directory: str | None, say: Say) -> int:
    run = find_run(name, home_directory(directory))
    for log in sorted((run.attempt(run.last_attempt()).path / "log").glob("*.log")):
        if log.stat().st_size:
            say(f"==> {log} <==\n{log.read_text(errors='replace').rstrip()}")
    return EXIT_DONE


def stop_command(name: str, directory: str | None, say: Say) -> int:
    run, launcher = find_run(name, home_directory(directory)), LocalLauncher()
    job = launcher.find(run.path)
    if job is None or launcher.state(job) is JobState.ENDED:
        if where := running_elsewhere(run):
            raise InputError(f"{run.path}: {where}; stop it there by `vit stop {run.path}`")
        say(f"{run.path.name} is not running")
        return EXIT_DONE
    launcher.cancel(job, STOP_GRACE_SECONDS)
    code, reason = conclude(run, job)
    say(f"{run.path.name}: {reason}")
    if code == EXIT_STOPPED:
        say(f"go on with: vit resume {run.path}")
    return EXIT_DONE if code in (EXIT_DONE, EXIT_STOPPED) else EXIT_FAILED


def resume_command(name: str, overrides: list[str], directory: str | None, say: Say) -> int:
    home = home_directory(directory)
    run = find_run(name, home)
    if overrides:
        if run_state(run, LocalLauncher()) == "running":
            raise InputError(f"{run.path}: is running; stop it first by `vit stop {run.path}`")
        of_recipe, of_profile = split_profile_overrides(overrides)
        profile_text, placement = requests.changed_profile(run.profile_file, of_profile)
        change_run(run, of_recipe, profile_text, placement)
    return _finish(_controlled(run, home, say), say)


def replay_command(name: str, step: int, directory: str | None) -> int:
    run = find_run(name, home_directory(directory))
    return subprocess.run([sys.executable, "-m", "pipeline.replay", str(run.path), str(step)]).returncode


def reconcile_command(directory: str | None, say: Say) -> int:
    from flows.reconciliation import reconcile_home

    return reconcile_home(home_directory(directory), say)


def up_command(directory: str | None, data: str | None, say: Say) -> int:
    from flows import stack

    home = home_directory(directory)
    started = time.monotonic()
    parts = stack.up(home, data, say)
    say(f"ready in {time.monotonic() - started:.0f} s")
    say(f"Prefect: {parts['prefect_ui_url']}   MLflow: {parts['mlflow_url']}")
    say("try: prefect deployment run pretrain/vit-l16 --watch")
    return EXIT_DONE


def down_command(directory: str | None, say: Say) -> int:
    from flows import stack

    stack.down(home_directory(directory), say)
    return EXIT_DONE


def status_command(directory: str | None, say: Say) -> int:
    from flows import stack

    for row in stack.status(home_directory(directory)):
        say("  ".join(str(value) for value in row.values()))
    return EXIT_DONE


def quickstart_command(directory: str | None, say: Say) -> int:
    home = home_directory(directory)
    from flows.temporary_server import prefect_server

    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    started = time.monotonic()
    with prefect_server(home, say):
        from flows.lifecycle import StageFailed
        from flows.quickstart import quickstart

        try:
            summary = quickstart(home, say, started)
        except StageFailed as error:
            say(str(error), error=True)
            return EXIT_FAILED
    write_json(home / "quickstart.json", summary)
    return EXIT_DONE
