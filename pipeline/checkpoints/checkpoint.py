"""Saving and loading a training state: each rank writes the fragments it owns, a manifest commits them.

Saving has three parts, so that training waits for none of them: a Snapshot copies the state into host memory,
`write_share` writes this rank's files and their sidecar, and `commit`, on rank 0 when all have written, checks the
sidecars, writes manifest.json last and renames. All is written to `step-N.attempt-A.partial`; the commit checks that
attempt A is still the current one before it renames, so a cut-off node cannot harm a newer attempt.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkpoints.files import FROZEN_FILE, StoredFragments, rank_file, read_model, write_parts
from pipeline.checkpoints.fragments import TrainingState
from pipeline.checkpoints.reading import Part, read_parts
from pipeline.checkpoints.snapshot import Snapshot
from pipeline.errors import FaultError
from pipeline.run_directory import FORMAT_VERSION, Attempt, Checkpoint, RunDirectory, read_json, write_json
from pipeline.shards.atomic import sync_directory, write_file


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained and persistent buffers, whole; taken before ZeRO-3 partitions the module."""
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    trained_names = {name for name, _ in module.named_parameters()}
    buffers = {n: b for n, b in module.state_dict().items() if n not in trained_names}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in (frozen | buffers).items()}


@torch.no_grad()
def load_frozen(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill what is not trained from a checkpoint, before ZeRO-3 partitions the module."""
    stored = safetensors.torch.load_file(checkpoint.directory / FROZEN_FILE)
    places = dict(module.named_parameters()) | module.state_dict()
    for name in stored.keys() & places.keys():
        places[name].copy_(stored[name])


@torch.no_grad()
def load_buffers(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the persistent buffers alone, which ZeRO-3 never partitions; of a module that trains already."""
    stored = safetensors.torch.load_file(checkpoint.directory / FROZEN_FILE)
    for name, buffer in module.named_buffers():
        if name in stored:
            buffer.copy_(stored[name])


def partial_directory(run: RunDirectory, attempt: Attempt, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}.attempt-{attempt.number:02d}.partial"


def write_share(snapshot: Snapshot, frozen: dict[str, Tensor], partial: Path) -> None:
    """Write this rank's files, and last a sidecar that says how large they are. FaultError names the file."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        written = snapshot.write(partial)
        if snapshot.rank == 0:
            content = safetensors.torch.save(frozen or {"@empty": torch.zeros(1)})
            written |= write_parts(partial / FROZEN_FILE, [content])
        write_json(_sidecar(partial, snapshot.rank), written)
    except OSError as error:
        raise FaultError(f"{partial}: cannot be written: {error.strerror or error}") from error


def _sidecar(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"


def commit(
    run: RunDirectory, attempt: Attempt, state: TrainingState, world_size: int, facts: dict[str, Any]
) -> Checkpoint:
    """Make the shares of all ranks a checkpoint; `facts` (with `step`) go into the manifest. Rank 0 only."""
    partial = partial_directory(run, attempt, facts["step"])
    try:
        files = _written_files(partial, world_size)
        manifest = {"format_version": FORMAT_VERSION} | facts
        manifest |= {"world_size": world_size, "shapes": state.shapes(), "files": files}
        write_json(partial / "manifest.json", manifest)
        for rank in range(world_size):
            _sidecar(partial, rank).unlink()
        sync_directory(partial)
        current = run.current_attempt()
        if current != attempt.number:
            raise FaultError(
                f"{run.path}: attempt {attempt.number} was replaced by attempt {current}; it may not commit"
            )
        return Checkpoint(_put_in_place(partial, run.checkpoints / f"step-{facts['step']:08d}"), manifest)
    except OSError as error:
        raise FaultError(f"{partial}: cannot be committed: {error}") from error


def _written_files(partial: Path, world_size: int) -> dict[str, dict[str, Any]]:
    """What the sidecars of all ranks say, each size compared with the file on disk."""
    files: dict[str, dict[str, Any]] = {}
    for rank in range(world_size):
        sidecar = read_json(_sidecar(partial, rank))
        if sidecar is None:
            raise FaultError(f"{_sidecar(partial, rank)}: not there; do all ranks see the same run directory?")
        files |= sidecar
    for name, entry in files.items():
        if (size := (partial / name).stat().st_size) != entry["bytes"]:
            raise FaultError(f"{partial / name}: {size} bytes on disk, {entry['bytes']} written")
    return files


def _put_in_place(partial: Path, final: Path) -> Path:
    """Rename; what an earlier attempt had committed at the same step goes only when this one stands."""
    replaced = final.with_name(f"{final.name}.replaced.partial")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(partial, final)
    sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def write_weights(checkpoint: Checkpoint, directory: Path) -> None:
    """The checkpoint's whole fp32 weights as `directory`/model.safetensors, which appears whole. FaultError."""
    path = directory / "model.safetensors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_file(path, safetensors.torch.save(read_model(checkpoint)))
    except OSError as error:
        raise FaultError(f"{path}: cannot be written: {error.strerror or error}") from error


@torch.no_grad()
def load_checkpoint(state: TrainingState, checkpoint: Checkpoint) -> None:
    """Read this rank's fragments, whoever wrote them, into where the tensors lie. Collective under ZeRO."""
    place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stored = StoredFragments(checkpoint, first=rank_file(*place))
    state.prepare_moments(checkpoint.manifest.get("updates", checkpoint.step))
    read_parts(_parts(state, stored))
    state.share()
    state.publish_average()


def _parts(state: TrainingState, stored: StoredFragments) -> Iterator[Part]:
    """All that this rank holds, in the order of a rank's file; the compute weights are filled along with the truth."""
    tensors, compute = state.tensors(), state.compute_flats()
    sources = {kind: kind if stored.has(kind) else "fp32" for kind in tensors}  # an average begins at the weights
    for one in state.fragments:
        for kind, flats in tensors.items():
            target, copy = flats[one.flat].narrow(0, one.offset, one.count), None
            if kind == "fp32" and compute:
                copy = compute[one.flat].view(-1).narrow(0, one.offset, one.count)
            yield from stored.parts(one.name, sources[kind], one.start, target, copy)
