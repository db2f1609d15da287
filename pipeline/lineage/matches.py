"""Where an image is in a dataset: the same bytes, the same pixels, or a near copy that the pixels confirm."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import DataError, InputError
from pipeline.ingestion.duplicates.likeness import (
    Likeness,
    are_near_copies,
    candidates,
    likeness,
    mirrored,
    pixel_distance,
    words,
)
from pipeline.ingestion.duplicates.sample_hashes import hashed_shards
from pipeline.ingestion.images import prepare_image
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import ShardReader, node_reader

HOW = {
    "bytes": "sha256 equal",
    "stored": "sha256 equal to what ingestion makes of the image",
    "pixels": "pixels equal, other bytes",
    "near": "a near copy",
    "mirrored": "a near copy of its mirror image",
}  # the order is that of certainty


class Query(NamedTuple):
    """The image that is asked for."""

    path: Path
    sha256: str
    plain: Likeness
    mirror: Likeness
    stored: np.ndarray | None  # (4,) uint64: SHA-256 of what ingestion would store, where that is something else


class Match(NamedTuple):
    """One sample that is, or looks like, the image. `distance` is in grey levels, 0 for equal pixels."""

    how: str  # of HOW
    split: str
    shard: int
    sample: int
    key: str
    sha256: str
    distance: float

    def in_words(self) -> str:
        near = f", {self.distance:.1f} grey levels apart" if self.how in ("near", "mirrored") else ""
        return f"key {self.key} ({HOW[self.how]}{near})"


def read_query(path: str) -> Query:
    """InputError where there is no image in the file."""
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"--contains {path}: cannot be read ({error.strerror or error}); name an image file") from None
    plain = likeness(content)
    if not plain.hashes["side"]:
        raise InputError(f"--contains {path}: holds no image that can be decoded; name an image file")
    stored = None
    for channels in ("rgb", "keep"):
        try:
            prepared = prepare_image(content, channels).content
        except ImageFault:
            continue
        if prepared != content:
            stored = words(hashlib.sha256(prepared))
            break
    return Query(file, hashlib.sha256(content).hexdigest(), plain, mirrored(plain), stored)


def find_image(
    query: Query, index: DatasetIndex, cache: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Match], int]:
    """The samples of any split that match, the surest first; and how many samples could not be read."""
    readers = {split: node_reader(index, split) for split in index.splits}
    found: list[Match] = []
    unread = 0
    for split, shard, hashes in hashed_shards(index, cache, progress):
        unread += int((~hashes["sha256"].any(axis=1)).sum())
        found += _in_shard(query, readers[split], split, shard, hashes)
    order = list(HOW)
    return sorted(found, key=lambda match: (order.index(match.how), match.distance, match.key)), unread


def _in_shard(query: Query, reader: ShardReader, split: str, shard: int, hashes: np.ndarray) -> list[Match]:
    exact = {"bytes": ("sha256", query.plain.hashes["sha256"]), "stored": ("sha256", query.stored)}
    exact["pixels"] = ("pixels", query.plain.hashes["pixels"])
    how: dict[int, tuple[str, float]] = {}
    for name, (column, wanted) in exact.items():
        if wanted is not None:
            for sample in np.flatnonzero((hashes[column] == wanted).all(axis=1)).tolist():
                how.setdefault(sample, (name, 0.0))
    for name, image in (("near", query.plain), ("mirrored", query.mirror)):
        for sample in np.flatnonzero(candidates(hashes, image.hashes)).tolist():
            if sample in how:
                continue
            try:
                other = likeness(reader.read(shard, sample).image)
            except DataError:
                continue
            if are_near_copies(image, other):
                how[sample] = (name, pixel_distance(image.shown, other.shown))
    if not how:
        return []
    keys = reader.keys(shard)
    return [
        Match(name, split, shard, sample, keys[sample], hashes["sha256"][sample].tobytes().hex(), distance)
        for sample, (name, distance) in how.items()
    ]
