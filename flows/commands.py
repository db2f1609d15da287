"""The bodies of the command line's commands; each returns an exit code and reports through `say`."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.job import JobState
from cluster.local import LocalLauncher
from flows import requests
from flows.home import home_directory
from flows.jobs import MIRRORED, STOP_GRACE_SECONDS, Conclusion, conclude, control, stop_on_interrupt
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
from pipeline.config.training import TrainingConfig
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_FAULT, EXIT_INPUT, EXIT_STOPPED, InputError, near_matches
from pipeline.ingestion.build import IngestError
from pipeline.ingestion.build import ingest as build_dataset
from pipeline.liveness import running_elsewhere
from pipeline.loading.verdict import expected_verdict
from pipeline.preparation.memory import lowest_stage_that_fits, memory_shortage
from pipeline.preparation.resume import change_run
from pipeline.preparation.training import PreparedRun
from pipeline.run_directory import RunDirectory, write_atomic, write_json
from pipeline.shards.check import check_dataset
from pipeline.words import bytes_in_words, duration_in_words

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
    lowest = lowest_stage_that_fits(prepared, placement)
    for line in plan_lines(prepared.plan, prepared.config, lowest):
        say(line)
    code, lines = _probed(prepared, chosen.price_per_device_hour)
    for line in lines:
        say(line)
    if (shortage := memory_shortage(prepared, placement)) is not None:
        say(f"does not fit here: {shortage}")
        return EXIT_INPUT
    return code


def _probed(prepared: PreparedRun, price_per_device_hour: float) -> tuple[int, list[str]]:
    """Whether the run would be input-bound on this machine, and how long it would take: an exit code, and lines.

    Measured in a process of its own, which may load torch. What the data would make of a training, damaged or out of
    reach, it makes of the plan.
    """
    request = {"config": prepared.config.model_dump(mode="json"), "plan": prepared.plan}
    process = subprocess.run(
        [sys.executable, "-m", "pipeline.loading.probe"], input=json.dumps(request), capture_output=True, text=True
    )
    words = process.stderr.strip().splitlines()
    if process.returncode == EXIT_INPUT:
        raise InputError(*words)
    if process.returncode:
        reason = words[-1] if words else f"its process ended with {process.returncode}"
        code = process.returncode if process.returncode in (EXIT_FAILED, EXIT_FAULT) else EXIT_FAULT
        return code, [f"data        the loader could not be measured: {reason}"]
    figures, plan = json.loads(process.stdout.splitlines()[-1]), prepared.plan
    notes = figures.pop("notes")
    verdict = expected_verdict(**figures, workers=plan["loader_workers"], config=prepared.config)
    seconds = plan["steps"]["samples"] / (min(figures.values()) * plan["nodes"])
    device_hours = seconds / 3600 * max(1, plan["accelerators_per_node"]) * plan["nodes"]
    unit = "GPU-hours" if plan["accelerators_per_node"] else "hours of this machine"
    price = f", price {price_per_device_hour * device_hours:,.2f}" if price_per_device_hour else ""
    time_line = f"time        about {duration_in_words(seconds)}, {device_hours:,.3g} {unit}{price}"
    return EXIT_DONE, [*(f"data        {line}" for line in [*notes, verdict]), time_line]


def plan_lines(plan: dict[str, Any], config: TrainingConfig, lowest_stage: int | None) -> list[str]:
    """What `vit plan` says before anything is measured; `lowest_stage` fits, None where none does or nobody knows."""
    advice = "" if lowest_stage is None else f"; the lowest that fits here: {lowest_stage}"
    batches, steps = plan["batches"], plan["steps"]
    memory = "  ".join(
        f"{name.removeprefix('stage ')}: {bytes_in_words(size)}" for name, size in plan["memory_bytes_per_rank"].items()
    )
    lines = [
        f"images      {plan['samples_per_epoch']:,} per epoch, {steps['samples']:,} seen in {steps['steps']:,} steps",
        f"batch       {batches['global_batch_size']} = {batches['world_size']} ranks x {batches['micro_batch_size']} "
        f"x {batches['gradient_accumulation_steps']} accumulated",
        f"model       {plan['parameters'] / 1e6:.3g} M parameters, "
        f"{plan['training_flops_per_image'] / 1e9:.3g} GFLOP per training image",
        f"memory      per rank by ZeRO stage (estimate): {memory}; "
        f"this recipe: stage {config.zero.stage}, {plan['precision']}{advice}",
        f"checkpoint  {bytes_in_words(plan['checkpoint_bytes'])}, {config.checkpoint.interval_in_words(plan['nodes'])}",
    ]
    if plan["accelerators_per_node"] == 0:
        lines.insert(
            4, f"            and {bytes_in_words(plan['host_bytes_per_rank'])} for the process and a checkpoint's copy"
        )
    return lines


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

        return mirrored(run, home, lambda: control(run, home, say, cancelled=cancelled))


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
        hours = hours_of(run)
        say(f"{run.path.name:<48} {run_state(run, launcher):<10} {step:<16} {hours:.3g} rank-hours")
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
    from flows.home import tracking_uri
    from pipeline.registry.locate import require_tracking_server
    from pipeline.registry.tracking import Mirror
    from pipeline.registry.writers import writers_of

    home, launcher = home_directory(directory), LocalLauncher()
    require_tracking_server(tracking_uri(home))
    statuses = {"done": "FINISHED", "running": "RUNNING", "stopped": "KILLED", "failed": "FAILED", "lost": "FAILED"}
    for path in sorted((home / "runs").glob("*/config.yaml")):
        run = RunDirectory(path.parent)
        state = run_state(run, launcher)
        if run.plan()["stage"] not in MIRRORED or state not in statuses:
            continue
        mirror = Mirror(run, tracking_uri(home), home)
        mirror.forward()
        if state != "running":
            mirror.finish(statuses[state])
            for writer in writers_of(run):
                writer.finish()
        say(f"{run.path.name}: {state}, MLflow says {statuses[state]}")
    return EXIT_DONE


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
