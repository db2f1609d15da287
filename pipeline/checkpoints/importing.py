"""A training state that DeepSpeed or accelerate wrote, brought once and offline into a run of ours."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.checkpoints.checkpoint import frozen_tensors
from pipeline.checkpoints.files import FROZEN_FILE, fragments_header, write_parts
from pipeline.checkpoints.foreign import KINDS, Foreign, read_accelerate, read_deepspeed
from pipeline.checkpoints.identity import facts_of_run
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.run_directory import FORMAT_VERSION, Checkpoint, RunDirectory, write_json

SHOWN = 3  # parameters that are named where names do not agree


def import_state(
    source: Path, run: RunDirectory, config: TrainingConfig, plan: Mapping[str, Any], module: nn.Module
) -> Checkpoint:
    """Make `source`, what `save_checkpoint` or accelerate's `save_state` wrote, the run's checkpoint at its step.

    `module` is the run's, for its names and shapes. The run goes on behind the samples that as many steps of it would
    have read. InputError where the source is no such directory, or holds another network.
    """
    if config.optimizer.kind != "adamw":
        raise InputError(f"{run.path}: optimizer.kind {config.optimizer.kind}: moments of AdamW alone are imported")
    parameters = dict(module.named_parameters())
    foreign = read_deepspeed(source, parameters, run.path) or read_accelerate(source, parameters)
    if foreign is None:
        raise InputError(
            f"{source}: holds neither *_optim_states.pt of DeepSpeed nor optimizer.bin and model.safetensors of "
            "accelerate; give the directory that `save_checkpoint` or `save_state` wrote; for weights alone say "
            "initialise_from=FILE"
        )
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items() if parameter.requires_grad}
    frozen = frozen_tensors(module)
    _require_same_network(source, foreign, shapes, frozen)
    final = run.checkpoints / f"step-{foreign.step:08d}"
    _require_place(source, foreign.step, plan, final)
    for name in foreign.weights.keys() & frozen.keys():
        frozen[name] = foreign.weights[name].to(frozen[name].dtype).view_as(frozen[name])
    tensors = {
        f"{name}@0@{kind}": tensor.detach().float().contiguous().flatten()
        for name in shapes
        for kind, tensor in zip(KINDS, (foreign.weights[name], *foreign.moments[name]), strict=True)
    }
    partial = final.with_name(f"{final.name}.import.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts = [fragments_header({key: tensor.numel() for key, tensor in tensors.items()})]
    parts += [memoryview(tensor.numpy()).cast("B") for tensor in tensors.values()]
    files = write_parts(partial / "rank-00000-of-00001.safetensors", parts)
    files |= write_parts(partial / FROZEN_FILE, [safetensors.torch.save(frozen or {"@empty": torch.zeros(1)})])
    manifest = {
        "format_version": FORMAT_VERSION, "step": foreign.step, "updates": foreign.step,
        "position": foreign.step * config.global_batch_size, "skipped": [], "damaged": {},
        **facts_of_run(config, plan), "ema": False, "world_size": 1, "shapes": shapes, "files": files,
        "imported_from": str(source),
    }  # fmt: skip
    write_json(partial / "manifest.json", manifest)
    partial.rename(final)
    return Checkpoint(final, manifest)


def _require_place(source: Path, step: int, plan: Mapping[str, Any], final: Path) -> None:
    """InputError where the run ends before the step, or has a checkpoint of it."""
    if step >= plan["steps"]["steps"]:
        raise InputError(
            f"{source}: is of step {step:,}, and the run ends at step {plan['steps']['steps']:,}; plan a longer run, "
            "or begin one from these weights by initialise_from"
        )
    if final.exists():
        raise InputError(f"{final}: the run has a checkpoint of this step; import into a new run")


def _require_same_network(
    source: Path, foreign: Foreign, shapes: Mapping[str, list[int]], frozen: Mapping[str, Tensor]
) -> None:
    """InputError where names or sizes do not agree. Of what is not trained here, the source need have nothing."""
    theirs = foreign.weights.keys()
    only_ours = shapes.keys() - (theirs & foreign.moments.keys())
    only_theirs = theirs - shapes.keys() - frozen.keys()
    if only_ours or only_theirs:
        here, there = (", ".join(sorted(names)[:SHOWN]) or "none" for names in (only_ours, only_theirs))
        raise InputError(f"{source}: holds another network than the run: only in the run: {here}; only there: {there}")
    ours = shapes | {name: list(tensor.shape) for name, tensor in frozen.items()}
    for name in sorted(theirs):
        flat = [torch.Size(ours[name]).numel()]  # what DeepSpeed makes of a tensor at some stages
        for tensor in (foreign.weights[name], *foreign.moments.get(name, ())):
            if list(tensor.shape) not in (ours[name], flat):
                raise InputError(f"{source}: {name} has the shape {list(tensor.shape)}, in the run {ours[name]}")
