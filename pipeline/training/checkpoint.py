"""Checkpoints: sharded safetensors fragments that each rank writes for what it owns, committed by a manifest.

    step-00000100/rank-00000-of-00002.safetensors   "PARAMETER@START@KIND": fp32, exp_avg, exp_avg_sq, ema
    step-00000100/frozen.safetensors                parameters and buffers that are not trained, whole
    step-00000100/manifest.json                     step, position, files with sizes and sha256, config, data

No pickle, and no collective but the commit. Written to `step-N.attempt-A.partial`; the commit checks that attempt A is
still the current one before it renames, so a cut-off node cannot harm a newer attempt.
"""

import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import FaultError
from pipeline.run_directory import FORMAT_VERSION, Attempt, Checkpoint, RunDirectory, write_json
from pipeline.training.fragments import TrainingState

FROZEN_FILE = "frozen.safetensors"


def save_checkpoint(
    state: TrainingState, run: RunDirectory, attempt: Attempt, *, rank: int, world_size: int,
    frozen: dict[str, Tensor], facts: dict[str, Any],
) -> Path:  # fmt: skip
    """Write and commit the state; `facts` (with `step`) goes into the manifest. Collective: every rank must call it."""
    name = f"step-{facts['step']:08d}"
    partial = run.checkpoints / f"{name}.attempt-{attempt.number:02d}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    written = {}
    fragments = _owned_fragments(state, rank, world_size)
    written |= _write(partial / f"rank-{rank:05d}-of-{world_size:05d}.safetensors", fragments)
    if rank == 0:
        written |= _write(partial / FROZEN_FILE, frozen)
    gathered: list[Any] = [None] * world_size
    if world_size > 1:
        dist.all_gather_object(gathered, written)  # also the barrier: every file is on disk
    else:
        gathered = [written]
    final = run.checkpoints / name
    if rank == 0:
        files = {file: entry for part in gathered for file, entry in part.items()}
        manifest = facts | {"world_size": world_size, "shapes": state.shapes(), "files": files}
        _commit(run, attempt, partial, final, manifest)
    if world_size > 1:
        dist.barrier()
    return final


def _owned_fragments(state: TrainingState, rank: int, world_size: int) -> dict[str, Tensor]:
    """This rank's share of the state on the host. Under plain data parallel every rank holds all and takes a part."""
    tensors = state.tensors()
    fragments = state.fragments if state.stage else state.fragments[rank::world_size]
    return {
        f"{f.name}@{f.start}@{kind}": flats[f.flat].narrow(0, f.offset, f.count).to("cpu", torch.float32, copy=True)
        for f in fragments
        for kind, flats in tensors.items()
    }


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained and persistent buffers, whole; taken before ZeRO-3 partitions the module."""
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    trained_names = {name for name, _ in module.named_parameters()}
    buffers = {n: b for n, b in module.state_dict().items() if n not in trained_names}
    return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in (frozen | buffers).items()}


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    if not tensors:
        tensors = {"@empty": torch.zeros(1)}
    save_file(tensors, path)
    digest = hashlib.sha256()
    with open(path, "r+b") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return {path.name: {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}}


def _commit(run: RunDirectory, attempt: Attempt, partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        size = (partial / name).stat().st_size
        if size != entry["bytes"]:
            raise FaultError(f"{partial / name}: {size} bytes on disk, {entry['bytes']} written")
    write_json(partial / "manifest.json", {"format_version": FORMAT_VERSION} | manifest)
    current = run.current_attempt()
    if current != attempt.number:
        raise FaultError(f"{run.path}: attempt {attempt.number} was replaced by attempt {current}; it may not commit")
    if final.exists():  # a later attempt repeats a step that an earlier one had committed
        shutil.rmtree(final)
    os.replace(partial, final)
    directory = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def prune_checkpoints(run: RunDirectory, keep: int) -> None:
    """Remove all but the newest `keep` verified checkpoints, and partial ones of earlier attempts. Rank 0 only."""
    for old in run.committed_checkpoints()[keep:]:
        shutil.rmtree(old.directory)
    current = run.current_attempt()
    for partial in run.checkpoints.glob("step-*.partial"):
        if not partial.name.endswith(f".attempt-{current:02d}.partial"):
            shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def load_checkpoint(state: TrainingState, checkpoint: Checkpoint) -> None:
    """Read this rank's fragments, whoever wrote them. Collective under ZeRO."""
    files = [safe_open(checkpoint.directory / name, "pt") for name in checkpoint.manifest["files"]]
    pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for file in files:
        for key in file.keys():
            if key.count("@") == 2:
                name, start, kind = key.split("@")
                pieces.setdefault((name, kind), []).append((int(start), file.get_slice(key)))
    state.prepare_moments(checkpoint.step)
    for kind, flats in state.tensors().items():
        source = "fp32" if kind == "ema" and not any(k == "ema" for _, k in pieces) else kind
        for fragment in state.fragments:
            target = flats[fragment.flat].narrow(0, fragment.offset, fragment.count)
            found = _read_range(pieces.get((fragment.name, source), []), fragment.start, target)
            assert found == fragment.count, (
                f"{checkpoint.directory}: {fragment.name} {source}: {found} of {fragment.count} elements"
            )
    state.publish()


def _read_range(pieces: list[tuple[int, Any]], start: int, target: Tensor) -> int:
    """Fill `target`, elements from `start` of a parameter, from the pieces that overlap it; returns how many."""
    end, found = start + target.numel(), 0
    for piece_start, piece in pieces:
        low, high = max(start, piece_start), min(end, piece_start + piece.get_shape()[0])
        if low < high:
            target[low - start : high - start].copy_(piece[low - piece_start : high - piece_start])
            found += high - low
    return found


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Whole fp32 tensors of a checkpoint: the moving average where there is one, and what was not trained.

    Needs no engine, no model and no world: any machine can read what any other wrote.
    """
    shapes = {name: tuple(shape) for name, shape in checkpoint.manifest["shapes"].items()}
    wanted = "ema" if checkpoint.manifest.get("ema") else "fp32"
    weights = {name: torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    found = dict.fromkeys(shapes, 0)
    for file_name in checkpoint.manifest["files"]:
        with safe_open(checkpoint.directory / file_name, "pt") as file:
            if file_name == FROZEN_FILE:
                frozen = {key: file.get_tensor(key) for key in file.keys() if "@" not in key}
                continue
            for key in file.keys():
                name, _, rest = key.partition("@")
                start, _, kind = rest.partition("@")
                if kind == wanted:
                    piece = file.get_tensor(key)
                    weights[name][int(start) : int(start) + len(piece)] = piece
                    found[name] += len(piece)
    for name, count in found.items():
        assert count == math.prod(shapes[name]), f"{checkpoint.directory}: {name}: {count} of {math.prod(shapes[name])}"
    return {name: tensor.view(shapes[name]) for name, tensor in weights.items()} | frozen
