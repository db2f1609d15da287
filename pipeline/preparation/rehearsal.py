"""Rehearsals: the whole path at the real model size for a few steps, with a stop and a resume, before the full run."""

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.config.recipe import read_yaml
from pipeline.config.training import LENGTH_UNITS
from pipeline.loading.sources import Sources
from pipeline.preparation.memory import bytes_per_rank_on_host
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import PreparedRun, prepare_training
from pipeline.registry.locate import ModelSource
from pipeline.run_directory import RunDirectory

STEPS_BEFORE_STOP = 2
STEPS = 4
DAY_SECONDS = 86_400
IMAGENET_SAMPLES = 1_281_167  # what published recipes count their epochs in
CPU_EFFICIENCY = 0.5  # share of a plain matrix product's speed that a training step reached on two cores


def prepare_rehearsal(
    stage: str, recipe: str, overrides: Sequence[str], sources: Sources, placement: Placement,
    model: ModelSource | None, full: PreparedRun, *, built_in_data: bool, teacher: ModelSource | None = None,
) -> PreparedRun:  # fmt: skip
    """The same recipe for a few steps of the smallest batch, stopped once and resumed; `full` is what it stands for."""
    micro = 2 if full.config.augmentation.mixes else 1
    least, most = placement.nodes_range or (placement.nodes, placement.nodes)
    nodes = range(least, most + 1)  # each number of them must be able to share the batch
    shortened = [
        f"steps={STEPS}",
        f"micro_batch_size={micro}",
        f"global_batch_size={micro * placement.ranks_per_node * math.lcm(*nodes)}",
        "checkpoint.keep=1",
        f"checkpoint.every_steps={STEPS}",
        "log_every_steps=1",
        "data.lanes=null",
        "validation.every_steps=0",
        "health.every_steps=0",
        "health.policy=report",
        "profiling.steps=null",
    ]
    dropped = {"checkpoint.keep", "checkpoint.every_steps", "log_every_steps", "data.lanes", "micro_batch_size",
               "global_batch_size", "validation.every_steps", "health.every_steps", "health.policy", "profiling.steps",
               "optimizer.warmup", "optimizer.cooldown", *LENGTH_UNITS}  # fmt: skip
    kept = [override for override in overrides if override.partition("=")[0] not in dropped]
    rehearsal = prepare_training(stage, recipe, [*kept, *shortened], sources, placement, model, teacher)
    return PreparedRun(
        rehearsal.name,
        rehearsal.config,
        rehearsal.plan
        | {
            "rehearsal": True,
            "stop_after_step": STEPS_BEFORE_STOP,
            "full_run": full_run(full, recipe, built_in_data=built_in_data),
        },
        rehearsal.notes,
    )


def full_run(full: PreparedRun, recipe: str, *, built_in_data: bool) -> dict[str, Any]:
    """Length of the run that a rehearsal stands for; without data of the user's own, on a set of ImageNet-1k's size."""
    samples = full.plan["steps"]["samples"]
    unit, amount = full.config.length
    if built_in_data and unit == "epochs":
        batch = full.plan["batches"]["global_batch_size"]
        samples = -(-round(amount * IMAGENET_SAMPLES) // batch) * batch
    return {
        "recipe": recipe,
        "samples": samples,
        "steps": samples // full.plan["batches"]["global_batch_size"],
        "flops": samples * full.plan["training_flops_per_image"],
        "on": "ImageNet-1k's 1,281,167 images" if built_in_data and unit == "epochs" else "this dataset",
    }


def verdict(run: RunDirectory) -> dict[str, Any]:
    """What a finished rehearsal measured, against the plan, and what the full run would cost at that speed."""
    plan, lines = run.plan(), []
    for number in range(1, run.last_attempt() + 1):
        ledger = run.attempt(number).ledger
        if ledger.is_file():
            lines += [json.loads(line) | {"attempt": number} for line in ledger.read_text().splitlines()]
    # The first step of each attempt pays for warming up; the others tell the speed.
    steady = [line for i, line in enumerate(lines) if i and lines[i - 1]["attempt"] == line["attempt"]] or lines
    seconds = sum(line["perf/last_step_seconds"] for line in steady) / len(steady)
    speed = plan["batches"]["global_batch_size"] / seconds
    hours = plan["full_run"]["samples"] / speed / 3600
    devices = max(1, plan["accelerators_per_node"]) * plan["nodes"]
    peak = max(line.get("perf/peak_memory_bytes", 0) for line in lines)
    stage = zero_stage(run)
    planned = plan["memory_bytes_per_rank"][f"stage {stage}"]
    if plan["accelerators_per_node"] == 0:
        planned = bytes_per_rank_on_host(plan, stage)
    return {
        "verdict": "ok",
        "attempts": run.last_attempt(),
        "images_per_second": speed,
        "teraflops": speed * plan["training_flops_per_image"] / 1e12,
        "peak_memory_bytes_per_rank": peak,
        "planned_memory_bytes_per_rank": planned,
        "full_run_hours": hours,
        "full_run_device_hours": hours * devices,
        "full_run_samples": plan["full_run"]["samples"],
        "full_run_steps": plan["full_run"]["steps"],
        "full_run_on": plan["full_run"]["on"],
        "precision": plan["precision"],
    }


def zero_stage(run: RunDirectory) -> int:
    """The ZeRO stage of a run."""
    return int(read_yaml(run.config_file)["zero"]["stage"])


def length_set_by_hand(overrides: Sequence[str]) -> bool:
    return any(override.partition("=")[0].strip() in LENGTH_UNITS for override in overrides)


def days_here(full: PreparedRun, where: Placement) -> float | None:
    """Seconds of a run that would take this machine, without an accelerator, more than a day; of any other None."""
    if not where.here or where.accelerators_per_node:  # others' processors are not timed on this one
        return None
    seconds = _seconds_without_accelerator(full)
    return seconds if seconds > DAY_SECONDS else None


def _seconds_without_accelerator(full: PreparedRun) -> float:
    """How long the full run would take on this machine's processor, from one timed matrix product."""
    size = 1024
    matrix = np.random.default_rng(0).random((size, size), dtype=np.float32)
    matrix @ matrix
    started = time.perf_counter()
    matrix @ matrix
    speed = 2 * size**3 / (time.perf_counter() - started)
    return full.plan["steps"]["samples"] * full.plan["training_flops_per_image"] / (CPU_EFFICIENCY * speed)
