"""Small idx files of the MNIST family, and what an ingestion made of a source."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import ShardReader


def idx_bytes(values: np.ndarray, kind: int = 0x08) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape) + values.tobytes()


def write_idx(path: Path, values: np.ndarray, kind: int = 0x08) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = idx_bytes(values, kind)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def pixels(number: int, count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (count, *(shape or (6, 5))), dtype=np.uint8)


def samples(index: DatasetIndex) -> dict[str, tuple[str, int, np.ndarray]]:
    """source -> (split, label, decoded pixels)"""
    found = {}
    for split in index.splits:
        reader = ShardReader(index, split)
        for shard, size in enumerate(reader.shard_sizes):
            for number in range(size):
                sample = reader.read(shard, number)
                image = np.asarray(Image.open(io.BytesIO(sample.image)))
                found[reader.record(shard, number)["source"]] = (split, sample.label, image)
    return found
