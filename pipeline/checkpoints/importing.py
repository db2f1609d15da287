"""A training state that DeepSpeed or accelerate wrote, brought once and offline into a run of ours.

DeepSpeed's own converter to its universal format takes its ZeRO partitions apart, at any stage and world size; what it
leaves is a weight and two moments per parameter. These files are pickles: import none that you would not run.
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.checkpoints.checkpoint import facts_of_run, frozen_tensors
from pipeline.checkpoints.files import FROZEN_FILE, fragments_header, write_parts
from pipeline.config.training import TrainingConfig
from pipeline.errors import FaultError, InputError
from pipeline.run_directory import FORMAT_VERSION, Checkpoint, RunDirectory, write_json

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
SHOWN = 3  # parameters that are named where names do not agree


def import_deepspeed(
    source: Path, run: RunDirectory, config: TrainingConfig, plan: Mapping[str, Any], module: nn.Module
) -> Checkpoint:
    """Make `source`, what `save_checkpoint` or accelerate's `save_state` wrote, the run's checkpoint at its step.

    `module` is the run's, for its names and shapes. The run goes on behind the samples that as many steps of it would
    have read. InputError where the source is no such directory, or holds another network.
    """
    folder = _tag_directory(source)
    with tempfile.TemporaryDirectory(dir=run.path) as scratch:
        stored = Path(_converted(folder, Path(scratch))) / "zero"
        shapes = {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        frozen = frozen_tensors(module)
        theirs = {path.name for path in stored.iterdir() if path.is_dir()}
        _require_same_names(source, set(shapes), theirs - frozen.keys())
        for name in theirs & frozen.keys():
            frozen[name] = _tensor(stored / name / "fp32.pt", list(frozen[name].shape), source).view_as(frozen[name])
        tensors = {}
        for name, shape in shapes.items():
            for kind in KINDS:
                tensors[f"{name}@0@{kind}"] = _tensor(stored / name / f"{kind}.pt", shape, source)
        step = _step(folder)
        final = run.checkpoints / f"step-{step:08d}"
        final.mkdir(parents=True)
        parts = [fragments_header({key: tensor.numel() for key, tensor in tensors.items()})]
        parts += [memoryview(tensor.numpy()).cast("B") for tensor in tensors.values()]
        files = write_parts(final / "rank-00000-of-00001.safetensors", parts)
    files |= write_parts(final / FROZEN_FILE, [safetensors.torch.save(frozen or {"@empty": torch.zeros(1)})])
    manifest = {
        "format_version": FORMAT_VERSION, "step": step, "updates": step, "position": step * config.global_batch_size,
        "skipped": [], "damaged": {}, **facts_of_run(config, plan), "ema": False, "world_size": 1, "shapes": shapes,
        "files": files, "imported_from": str(source),
    }  # fmt: skip
    write_json(final / "manifest.json", manifest)
    return Checkpoint(final, manifest)


def _tag_directory(source: Path) -> Path:
    """Where DeepSpeed's files lie: named by `latest`, in accelerate's `pytorch_model`, or right here."""
    latest = source / "latest"
    candidates = [source / latest.read_text().strip()] if latest.is_file() else []
    for folder in [*candidates, source / "pytorch_model", source]:
        if any(folder.glob("*_optim_states.pt")):
            return folder
    raise InputError(
        f"{source}: holds no *_optim_states.pt of DeepSpeed; give the directory that `save_checkpoint` or accelerate's "
        "`save_state` wrote; for weights alone say initialise_from=FILE"
    )


def _converted(folder: Path, scratch: Path) -> Path:
    universal = scratch / "universal"
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder),
        "--output_folder", str(universal), "--inject_missing_state", "--num_extract_workers", "1",
        "--num_merge_workers", "1",
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no word"])[-1]
        raise FaultError(f"{folder}: DeepSpeed cannot convert it: {last}")
    return universal


def _require_same_names(source: Path, ours: set[str], theirs: set[str]) -> None:
    if ours != theirs:
        only_ours, only_theirs = (
            ", ".join(sorted(names)[:SHOWN]) or "none" for names in (ours - theirs, theirs - ours)
        )
        raise InputError(
            f"{source}: holds another network than the run: only in the run: {only_ours}; only there: {only_theirs}"
        )


def _tensor(path: Path, shape: list[int], source: Path) -> Tensor:
    stored = torch.load(path, weights_only=False, map_location="cpu")
    tensor = (stored["param"] if isinstance(stored, dict) else stored).detach().float().contiguous()
    if tensor.numel() != torch.Size(shape).numel():
        raise InputError(f"{source}: {path.parent.name} has {tensor.numel()} elements, in the run {shape}")
    return tensor.flatten()


def _step(folder: Path) -> int:
    states = next(folder.glob("*model_states.pt"))
    return int(torch.load(states, weights_only=False, map_location="cpu")["global_steps"])
