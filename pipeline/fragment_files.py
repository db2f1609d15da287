"""The files of a checkpoint: fragments of parameters in safetensors, read whoever wrote them, at any world size.

    step-00000100/rank-00000-of-00002.safetensors   "PARAMETER@START@KIND": fp32, exp_avg, exp_avg_sq, ema
    step-00000100/frozen.safetensors                parameters and buffers that are not trained, whole
    step-00000100/manifest.json                     step, position, shapes, files with sizes and sha256, config, data

No pickle, no engine, no world: any machine can read what any other wrote.
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import FaultError
from pipeline.run_directory import Checkpoint

FROZEN_FILE = "frozen.safetensors"
PIECE_BYTES = 8 << 20


def fragments_header(counts: Mapping[str, int]) -> bytes:
    """The head of a safetensors file of one-dimensional fp32 tensors that lie one behind the other, in this order."""
    header, offset = {}, 0
    for key, count in counts.items():
        header[key] = {"dtype": "F32", "shape": [count], "data_offsets": [offset, offset + 4 * count]}
        offset += 4 * count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def write_parts(path: Path, parts: Sequence[bytes | memoryview]) -> dict[str, dict[str, Any]]:
    """Write and fsync one file of `parts`; returns its entry for the manifest: bytes and sha256 by file name.

    Each piece is hashed by a second thread while it is written, so the file is not read again. FaultError.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as hasher:
            for piece in _pieces(parts):
                hashed = hasher.submit(digest.update, piece)
                _write_all(file, piece)
                size += len(piece)
                hashed.result()
            os.fsync(file.fileno())
    except OSError as error:  # a full or failing disk: earlier checkpoints stand
        raise FaultError(f"{path}: cannot be written: {error.strerror or error}") from error
    return {path.name: {"bytes": size, "sha256": digest.hexdigest()}}


def _pieces(parts: Sequence[bytes | memoryview]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), PIECE_BYTES):
            yield view[start : start + PIECE_BYTES]


def _write_all(file: io.FileIO, piece: memoryview) -> None:
    while piece:
        piece = piece[file.write(piece) :]


def sha256_of(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
