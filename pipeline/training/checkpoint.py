"""Saving and loading a training state: each rank writes the fragments it owns, a manifest commits them.

No collective but the commit. Written to `step-N.attempt-A.partial`; the commit checks that attempt A is still the
current one before it renames, so a cut-off node cannot harm a newer attempt.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import FaultError
from pipeline.fragment_files import FROZEN_FILE, StoredFragments, write_tensors
from pipeline.run_directory import FORMAT_VERSION, Attempt, Checkpoint, RunDirectory, write_json
from pipeline.training.fragments import TrainingState


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
    written |= write_tensors(partial / f"rank-{rank:05d}-of-{world_size:05d}.safetensors", fragments)
    if rank == 0:
        written |= write_tensors(partial / FROZEN_FILE, frozen)
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
    stored = StoredFragments(checkpoint)
    state.prepare_moments(checkpoint.manifest.get("updates", checkpoint.step))
    for kind, flats in state.tensors().items():
        source = kind if stored.has(kind) else "fp32"  # an average that was switched on starts at the weights
        for fragment in state.fragments:
            target = flats[fragment.flat].narrow(0, fragment.offset, fragment.count)
            stored.read(fragment.name, source, fragment.start, target)
    state.publish()
