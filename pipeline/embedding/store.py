"""A folder of embeddings: one parquet file per shard of the dataset, and `embeddings.json` that says whose they are.

A file is whole or not there, and one that is there is not made again: so a killed job goes on where it was, and any
number of ranks may write. Columns: key, split, shard, label (null where there is none), class, embedding (a list of D
float32). A shard of which every sample was taken down has a file without rows. Torch-free.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.run_directory import read_json, write_json
from pipeline.shards.atomic import TEMPORARY_PREFIX, remove_temporaries, replaced_file
from pipeline.shards.index import DatasetIndex

FACTS = "embeddings.json"
DAY = 86_400.0  # seconds


class Neighbour(NamedTuple):
    """An image of the store, and the cosine of its features with the query's."""

    similarity: float
    key: str
    split: str
    shard: str
    class_name: str | None


def begin_store(folder: Path, facts: dict[str, Any]) -> None:
    """Make the folder, or go on with it, rid of what a writer left that was killed a day ago. InputError where it holds
    something else or other embeddings."""
    known = read_json(folder / FACTS)
    if known is not None:
        different = [key for key in facts if known.get(key) != facts[key]]
        if different:
            key = different[0]
            raise InputError(
                f"{folder}: holds other embeddings ({key} {known.get(key)!r}, asked for {facts[key]!r}); choose "
                "another DEST"
            )
        remove_temporaries(folder, older_than_seconds=DAY)
        return
    if folder.exists() and any(not _is_temporary(path) for path in folder.iterdir()):
        raise InputError(f"{folder}: is not empty and holds no embeddings; choose another DEST")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FACTS, facts)


def _is_temporary(path: Path) -> bool:
    """Of `write_shard`, or of `write_json` a moment before the folder was one of embeddings."""
    return path.name.startswith((TEMPORARY_PREFIX, f".{FACTS}."))


def file_of(folder: Path, shard_name: str) -> Path:
    return folder / f"{shard_name.removesuffix('.tar')}.parquet"


def missing_shards(folder: Path, index: DatasetIndex, splits: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the shards of each split whose file is not there yet."""
    return {
        split: [number for number, shard in enumerate(index.shards(split)) if not file_of(folder, shard.name).is_file()]
        for split in splits
    }


def write_shard(
    folder: Path, shard: str, split: str, keys: Sequence[str], labels: np.ndarray, classes: Sequence[str],
    embeddings: np.ndarray,
) -> None:  # fmt: skip
    """One file, whole or not at all.

    Shape:
        labels: (S,) int64, -1 where there is none
        embeddings: (S, D) float32
    """
    width, rows = embeddings.shape[1], len(keys)
    flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1), pa.float32())
    table = pa.table({
        "key": pa.array(keys, pa.string()),
        "split": pa.array([split] * rows, pa.string()),
        "shard": pa.array([shard] * rows, pa.string()),
        "label": pa.array([int(label) if label >= 0 else None for label in labels], pa.int32()),
        "class": pa.array([classes[label] if 0 <= label < len(classes) else None for label in labels], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
    })  # fmt: skip
    with replaced_file(file_of(folder, shard)) as file:
        pq.write_table(table, file, compression="zstd")


def nearest(folder: Path, queries: np.ndarray, count: int) -> list[list[Neighbour]]:
    """The images of a store whose features point most nearly where those of each query do, the nearest first.

    One file is in memory at a time.

    Shape:
        queries: (Q, D) float32
    """
    queries = _unit(queries)
    best: list[list[Neighbour]] = [[] for _ in queries]
    for table in _tables(folder):
        embeddings = table["embedding"].combine_chunks()
        values = embeddings.flatten().to_numpy().reshape(len(table), -1)
        similarity = queries @ _unit(values).T  # (Q, S)
        for query, row in enumerate(similarity):
            places = np.argsort(-row, kind="stable")[:count]
            found = [_neighbour(table, int(place), float(row[place])) for place in places]
            best[query] = sorted([*best[query], *found], key=lambda one: -one.similarity)[:count]
    return best


def _tables(folder: Path) -> Iterator[pa.Table]:
    """Of every file that has rows."""
    for path in sorted(folder.glob("*.parquet")):
        if not _is_temporary(path) and len(table := pq.read_table(path)):
            yield table


def _neighbour(table: pa.Table, place: int, similarity: float) -> Neighbour:
    row = table.slice(place, 1)
    key, split, shard, name = (row[column][0].as_py() for column in ("key", "split", "shard", "class"))
    return Neighbour(similarity, key, split, shard, name)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
