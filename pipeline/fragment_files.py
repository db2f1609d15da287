"""The files of a checkpoint: fragments of parameters in safetensors, read whoever wrote them, at any world size.

    step-00000100/rank-00000-of-00002.safetensors   "PARAMETER@START@KIND": fp32, exp_avg, exp_avg_sq, ema
    step-00000100/frozen.safetensors                parameters and buffers that are not trained, whole
    step-00000100/manifest.json                     step, position, shapes, files with sizes and sha256, config, data

No pickle, no engine, no world: any machine can read what any other wrote.
"""

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import FaultError
from pipeline.run_directory import Checkpoint

FROZEN_FILE = "frozen.safetensors"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write and fsync one file; returns its entry for the manifest: bytes and sha256 by file name."""
    if not tensors:
        tensors = {"@empty": torch.zeros(1)}
    try:
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:  # a full or failing disk: earlier checkpoints stand
        raise FaultError(f"{path}: cannot be written: {error}") from error
    digest = hashlib.sha256()
    with open(path, "r+b") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return {path.name: {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}}


class StoredFragments:
    """The fragments of one checkpoint, found by parameter and kind; tensors are read only where they are asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self.directory = checkpoint.directory
        self.pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for name in checkpoint.manifest["files"]:
            if name == FROZEN_FILE:
                continue
            file = safe_open(self.directory / name, "pt")
            for key in file.keys():
                if key.count("@") == 2:
                    parameter, start, kind = key.split("@")
                    self.pieces.setdefault((parameter, kind), []).append((int(start), file.get_slice(key)))

    def has(self, kind: str) -> bool:
        return any(stored == kind for _, stored in self.pieces)

    def read(self, name: str, kind: str, start: int, target: Tensor) -> None:
        """Fill `target`, one-dimensional, with elements from `start` of a parameter; every one must be stored once."""
        end, found = start + target.numel(), 0
        for piece_start, piece in self.pieces.get((name, kind), ()):
            low, high = max(start, piece_start), min(end, piece_start + piece.get_shape()[0])
            if low < high:
                target[low - start : high - start].copy_(piece[low - piece_start : high - piece_start])
                found += high - low
        assert found == target.numel(), f"{self.directory}: {name} {kind}: {found} of {target.numel()} elements"


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Whole fp32 tensors: the moving average where there is one, and what was not trained."""
    stored = StoredFragments(checkpoint)
    kind = "ema" if checkpoint.manifest.get("ema") else "fp32"
    weights = {}
    for name, shape in checkpoint.manifest["shapes"].items():
        flat = torch.empty(math.prod(shape))
        stored.read(name, kind, 0, flat)
        weights[name] = flat.view(shape)
    frozen = load_file(checkpoint.directory / FROZEN_FILE)
    return weights | {name: tensor for name, tensor in frozen.items() if "@" not in name}
