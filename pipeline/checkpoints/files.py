"""The files of a checkpoint: fragments of parameters in safetensors, read whoever wrote them, at any world size.

    step-00000100/rank-00000-of-00002.safetensors   "PARAMETER@START@KIND": fp32, exp_avg, exp_avg_sq, ema
    step-00000100/frozen.safetensors                parameters and buffers that are not trained, whole
    step-00000100/manifest.json                     step, position, shapes, files with sizes and checksums, config, data

No pickle, no engine, no world: any machine can read what any other wrote.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from models.tuning.config import AdaLoRATuning, LoRATuning, TuningConfig
from models.tuning.low_rank import merged
from pipeline.checkpoints.checksums import CHECKSUM, checksum
from pipeline.checkpoints.reading import Part, read_parts
from pipeline.errors import FaultError
from pipeline.run_directory import Checkpoint

FROZEN_FILE = "frozen.safetensors"


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


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
    """Write and fsync one file of `parts`; returns its entry for the manifest: bytes and checksum by file name.

    A second thread hashes the same memory meanwhile, so the file is not read again. FaultError.
    """
    try:
        with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as hasher:
            hashed = hasher.submit(checksum, parts)
            for part in parts:
                _write_all(file, memoryview(part))
            os.fsync(file.fileno())
            return {path.name: {"bytes": sum(map(len, parts)), CHECKSUM: hashed.result()}}
    except OSError as error:  # a full or failing disk: earlier checkpoints stand
        raise FaultError(f"{path}: cannot be written: {error.strerror or error}") from error


def _write_all(file: io.FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]


class _Piece(NamedTuple):
    """Elements [start, start + count) of a parameter, at `offset` bytes of a file."""

    start: int
    count: int
    file: io.FileIO
    offset: int


class StoredFragments:
    """The fragments of one checkpoint, found by parameter and kind; tensors are read only where they are asked for.

    Files are opened as they are needed, `first` of all, where it is there: a rank of the same topology then opens its
    own alone, and a thousand ranks do not open a thousand files each.
    """

    def __init__(self, checkpoint: Checkpoint, first: str = ""):
        self.directory = checkpoint.directory
        names = [name for name in checkpoint.manifest["files"] if name != FROZEN_FILE]
        self._unopened = sorted(names, key=lambda name: name != first)[::-1]
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}

    def _open_next(self) -> None:
        file = open(self.directory / self._unopened.pop(), "rb", buffering=0)
        for key, (offset, count) in _places(file).items():
            if key.count("@") == 2:
                parameter, start, kind = key.split("@")
                self._pieces.setdefault((parameter, kind), []).append(_Piece(int(start), count, file, offset))

    def has(self, kind: str) -> bool:
        """Whether the checkpoint has this kind: of one parameter, then of all."""
        while not self._pieces and self._unopened:
            self._open_next()
        return any(stored == kind for _, stored in self._pieces)

    def parts(self, name: str, kind: str, start: int, target: Tensor, copy: Tensor | None = None) -> list[Part]:
        """What fills `target`, one-dimensional, with elements from `start` of a parameter, every one of which must be
        stored once; and from it `copy`. `read_parts` reads them, with others."""
        end, found, seen = start + target.numel(), 0, 0
        parts = []
        while True:
            pieces = self._pieces.get((name, kind), [])
            for piece in pieces[seen:]:
                low, high = max(start, piece.start), min(end, piece.start + piece.count)
                if low < high:
                    part = Part(piece.file, piece.offset + 4 * (low - piece.start), target, copy)
                    if (low, high) != (start, end):
                        within = slice(low - start, high - start)
                        part = part._replace(target=target[within], copy=None if copy is None else copy[within])
                    parts.append(part)
                    found += high - low
            seen = len(pieces)
            if found >= target.numel() or not self._unopened:
                break
            self._open_next()
        assert found == target.numel(), f"{self.directory}: {name} {kind}: {found} of {target.numel()} elements"
        return parts


def _places(file: io.FileIO) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file of fp32 lies: the offset of its bytes, and its number of elements."""
    size = int.from_bytes(file.read(8), "little")
    places = {}
    for key, entry in json.loads(file.read(size)).items():
        if key != "__metadata__":
            assert entry["dtype"] == "F32", f"{file.name}: {key} is {entry['dtype']}"
            begin, end = entry["data_offsets"]
            places[key] = (8 + size + begin, (end - begin) // 4)
    return places


def read_model(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Whole fp32 tensors as of a network without peft's layers: what low-rank tuning learned is merged."""
    weights, raw = read_weights(checkpoint), checkpoint.manifest.get("config", {}).get("tuning")
    tuning = TypeAdapter(TuningConfig).validate_python(raw) if raw else None
    return merged(weights, tuning) if isinstance(tuning, LoRATuning | AdaLoRATuning) else weights


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Whole fp32 tensors: the moving average where there is one, and what was not trained."""
    stored = StoredFragments(checkpoint)
    kind = "ema" if checkpoint.manifest.get("ema") else "fp32"
    shapes = checkpoint.manifest["shapes"]
    flats = {name: torch.empty(math.prod(shape)) for name, shape in shapes.items()}
    read_parts(part for name, flat in flats.items() for part in stored.parts(name, kind, 0, flat))
    weights = {name: flat.view(shapes[name]) for name, flat in flats.items()}
    frozen = load_file(checkpoint.directory / FROZEN_FILE)
    return weights | {name: tensor for name, tensor in frozen.items() if "@" not in name}
