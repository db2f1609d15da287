"""What `vit plan` says of a prepared run: what follows from it, whether its data keep up here, and what it costs."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.profile import LocalProfile, Profile
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_FAULT, EXIT_INPUT, InputError
from pipeline.forecast.grading import kept_words
from pipeline.forecast.outlook import outlook
from pipeline.forecast.pace import ACCELERATOR_FLOPS, LEAST_RUNS, PROCESSOR_FLOPS, learned_pace
from pipeline.forecast.past import PastRun, past_runs, place_of
from pipeline.launch import environment_of_ranks
from pipeline.loading.verdict import expected_images_per_second, expected_verdict
from pipeline.preparation.training import PreparedRun
from pipeline.preparation.write import run_path
from pipeline.training.start_table import trained_in_words
from pipeline.words import bytes_in_words, duration_in_words, number_in_words


def plan_lines(prepared: PreparedRun, profile: str, lowest_stage: int | None) -> list[str]:
    """What is known before anything is measured; `lowest_stage` fits, None where none does or nobody knows."""
    plan, batches, steps = prepared.plan, prepared.plan["batches"], prepared.plan["steps"]
    epochs = steps["samples"] / plan["samples_per_epoch"]
    lines = [
        f"recipe      {prepared.name} on {plan['data']['name']}; profile {profile}: {_placement_in_words(plan)}",
        f"length      {steps['steps']:,} steps = {number_in_words(epochs)} epochs of {plan['samples_per_epoch']:,} "
        f"images: {steps['samples']:,} images seen",
        f"batch       {batches['global_batch_size']:,} images = {batches['world_size']} ranks x "
        f"micro-batch {batches['micro_batch_size']} x {batches['gradient_accumulation_steps']:,} accumulated",
        f"model       {number_in_words(plan['parameters'] / 1e6)} M parameters, "
        f"{number_in_words(plan['training_flops_per_image'] / 1e9)} GFLOP per training image",
        f"trained     {trained_in_words(prepared.config, plan)}",
        *_memory_lines(prepared, lowest_stage),
        f"checkpoint  {bytes_in_words(plan['checkpoint_bytes'])}, "
        f"{prepared.config.checkpoint.interval_in_words(plan['nodes'])}",
    ]
    return lines + [f"note        {note}" for note in prepared.notes]


def _placement_in_words(plan: dict[str, Any]) -> str:
    devices = "an accelerator each" if plan["accelerators_per_node"] else "no accelerator"
    least, most = plan["nodes_range"]
    nodes = _counted(most, "node") if least == most else f"{least} to {most} nodes"
    ranks = _counted(plan["ranks_per_node"], "rank")
    return f"{nodes} x {ranks}, {devices}, {_counted(plan['loader_workers'], 'loader worker')} each"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _memory_lines(prepared: PreparedRun, lowest_stage: int | None) -> list[str]:
    plan = prepared.plan
    sizes = "  ".join(
        f"{name.removeprefix('stage ')}: {bytes_in_words(size)}" for name, size in plan["memory_bytes_per_rank"].items()
    )
    advice = "" if lowest_stage is None else f"; the lowest that fits here: {lowest_stage}"
    lines = [
        f"memory      per rank by ZeRO stage (estimate)  {sizes}",
        f"            this recipe: stage {prepared.config.zero.stage}, {plan['precision']}{advice}",
    ]
    if plan["accelerators_per_node"] == 0:
        lines.append(
            f"            and {bytes_in_words(plan['host_bytes_per_rank'])} for the process and a checkpoint's copy"
        )
    return lines


def measured(prepared: PreparedRun, profile: Profile) -> tuple[int, list[str]]:
    """Whether the run would be input-bound on this machine, and how long it would take: an exit code, and lines.

    Measured in a process of its own, which may load torch, in the environment of a rank. What the data would make of a
    training, damaged or out of reach, it makes of the plan. A cluster's nodes cannot be measured from here.
    """
    if not isinstance(profile, LocalProfile):
        return EXIT_DONE, unmeasured_lines(prepared.plan, profile.price_per_device_hour, here=False)
    request = {"config": prepared.config.model_dump(mode="json"), "plan": prepared.plan}
    process = subprocess.run(
        [sys.executable, "-m", "pipeline.loading.probe"], input=json.dumps(request), capture_output=True, text=True,
        env=environment_of_ranks(prepared.plan, os.environ | profile.env),
    )  # fmt: skip
    words = process.stderr.strip().splitlines()
    if process.returncode == EXIT_INPUT:
        raise InputError(*words)
    if process.returncode:
        reason = words[-1] if words else f"its process ended with {process.returncode}"
        code = process.returncode if process.returncode in (EXIT_FAILED, EXIT_FAULT) else EXIT_FAULT
        return code, [f"data        the loader could not be measured: {reason}"]
    figures, workers = json.loads(process.stdout.splitlines()[-1]), prepared.plan["loader_workers"]
    notes = [note for note in figures.pop("notes") if note not in prepared.notes]
    verdict = expected_verdict(**figures, workers=workers, config=prepared.config)
    lines = [f"data        {line}" for line in [*notes, verdict]]
    if figures["model_images_per_second"] is None:
        return EXIT_DONE, lines + unmeasured_lines(prepared.plan, profile.price_per_device_hour)
    speed = expected_images_per_second(**figures, workers=workers) * prepared.plan["nodes"]
    return EXIT_DONE, lines + cost_lines(prepared, speed, profile.price_per_device_hour)


def cost_lines(prepared: PreparedRun, images_per_second: float, price_per_device_hour: float) -> list[str]:
    """Time, accelerators' time and price of the whole run at a speed; and where its budget ends it."""
    plan, budget = prepared.plan, prepared.config.budget_gpu_hours
    seconds, steps = plan["steps"]["samples"] / images_per_second, plan["steps"]["steps"]
    rank_hours = seconds / 3600 * plan["world_size"]
    lines = [f"time        about {duration_in_words(seconds)}"]
    if cost := _cost(plan, seconds, price_per_device_hour):
        lines.append(f"cost        {cost}")
    if budget is not None and rank_hours > budget:
        lines.append(
            f"budget      all of it takes about {number_in_words(rank_hours)} rank-hours and budget_gpu_hours is "
            f"{number_in_words(budget)}: the run will stop with a checkpoint at about step "
            f"{int(steps * budget / rank_hours):,} of {steps:,}"
        )
    return lines


def learned_lines(prepared: PreparedRun, profile: Profile, home: Path) -> list[str]:
    """What past runs of the home and its ladders say of this one, and how well forecasts here were kept."""
    plan, runs, asked = prepared.plan, past_runs(home), profile.model_dump(mode="json")
    pace = learned_pace(runs, place_of(plan, asked))
    lines = [f"learned     {'no past runs to learn from' if pace is None else pace.in_words}"]
    said = outlook(prepared.config, plan, home, asked, run_path(prepared, home, None))
    if pace is not None and len(pace.ratios) < LEAST_RUNS:
        lines[0] += f"; {LEAST_RUNS} make a forecast"
    elif pace is not None and "hours" not in said.forecasts:
        lines[0] += "; their steps are too unlike these to forecast its time"
    lines += [f"            {words}" for words in said.in_words]
    lines += [f"            {note}" for note in said.notes]
    if (scores := _past_scores(prepared, runs)) is not None:
        lines.append(f"            {scores}")
    if (kept := kept_words(runs)) is not None:
        lines.append(f"            forecasts of past runs held what came (80 of 100 should): {kept}")
    return lines


def _past_scores(prepared: PreparedRun, runs: Sequence[PastRun]) -> str | None:
    """What past runs of this objective scored on this very dataset, whatever their settings; None where none did."""
    metric, kind = prepared.config.validation.best_metric, prepared.config.objective.kind
    if metric is None:
        return None
    bests = {
        past.run.path.name: past.result["best"]["value"] for past in runs
        if (past.result.get("best") or {}).get("metric") == metric[0]
        and past.plan["data"]["fingerprint"] == prepared.plan["data"]["fingerprint"] and past.objective == kind
    }  # fmt: skip
    if not bests:
        return None
    in_order = sorted(bests, key=bests.__getitem__, reverse=metric[1] == "min")
    worst, best = in_order[0], in_order[-1]
    return (
        f"{kind} on these images so far: {metric[0]} {bests[worst]:.4f} to {bests[best]:.4f} in {len(bests)} past "
        f"run{'' if len(bests) == 1 else 's'}, the best {best}"
    )


def unmeasured_lines(plan: dict[str, Any], price_per_device_hour: float, *, here: bool = True) -> list[str]:
    """Instead of the time, where the plan is for devices that this machine does not have."""
    devices, seconds = plan["accelerators_per_node"], plan["steps"]["steps"] * seconds_per_step(plan)
    why = "the run goes to other machines than this one"
    if here:
        why = f"profile.accelerators_per_node is {devices} and there is no accelerator here"
    assumed = f"{ACCELERATOR_FLOPS / 1e12:.0f} TFLOP/s from each"
    if not devices:
        assumed = f"{PROCESSOR_FLOPS / 1e9:.0f} GFLOP/s from each rank"
    return [
        f"time        not measured: {why}; run `vit plan` where they are",
        f"cost        not measured; {assumed} would make it {duration_in_words(seconds)}, "
        f"{_cost(plan, seconds, price_per_device_hour)}".rstrip(", "),
    ]


def seconds_per_step(plan: dict[str, Any]) -> float:
    """What a step would take at a stated speed, where nothing was measured."""
    speed = ACCELERATOR_FLOPS if plan["accelerators_per_node"] else PROCESSOR_FLOPS
    flops = plan["batches"]["global_batch_size"] * plan["training_flops_per_image"]
    return flops / (speed * plan["batches"]["world_size"])


def _cost(plan: dict[str, Any], seconds: float, price_per_device_hour: float) -> str:
    """Hours of all devices, where that says more than the time, and their price, where it is known."""
    hours = seconds / 3600 * max(1, plan["accelerators_per_node"]) * plan["nodes"]
    price = price_per_device_hour * hours
    parts = [f"price {price:,.2f}" if price >= 0.01 else "price less than 0.01"] if price else []
    if plan["accelerators_per_node"] or plan["nodes"] > 1:
        unit = "GPU-hours" if plan["accelerators_per_node"] else "machine-hours"
        parts.insert(0, f"{number_in_words(hours)} {unit}")
    return ", ".join(parts)
