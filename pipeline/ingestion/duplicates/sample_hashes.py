"""The likeness of every sample of a dataset: as its ingestion kept it, else computed once on all cores and kept, 140
bytes a sample, a file a shard.

What is finished stays when the work is interrupted; a shard that changed is hashed anew, its neighbours are not.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from pipeline.errors import DataError
from pipeline.ingestion.duplicates.hash_file import EXAMINED, VERSION, HashFile, hash_path, read_hashes, write_hashes
from pipeline.ingestion.duplicates.likeness import HASHES, likeness
from pipeline.ingestion.progress import Counted
from pipeline.shards.atomic import write_file
from pipeline.shards.index import DatasetIndex, Shard
from pipeline.shards.parallel import POOL_FROM_BYTES, available_cores, in_processes
from pipeline.shards.reader import node_reader


class HashedShard(NamedTuple):
    """(samples,) `HASHES` of one shard, mapped from the disk; zeros where a sample could not be read."""

    split: str
    shard: int
    hashes: np.ndarray


class _Task(NamedTuple):
    """`index` has this shard alone."""

    index: DatasetIndex
    split: str
    path: Path


class _Lost(NamedTuple):
    """`index` has this shard alone; `files` (samples,) uint32."""

    index: DatasetIndex
    split: str
    files: np.ndarray


def hashed_shards(index: DatasetIndex, cache: Path, progress: Counted | None = None) -> Iterator[HashedShard]:
    """Every shard of every split, one at a time, once all are hashed; `cache` keeps what the dataset does not."""
    folder = cache / f"likeness-{VERSION}-pillow-{PIL.__version__}" / index.fingerprint[:32]
    folder.mkdir(parents=True, exist_ok=True)
    shards = [(split, number, shard) for split in index.splits for number, shard in enumerate(index.shards(split))]
    known = {
        (split, number)
        for split, number, shard in shards
        if read_hashes(hash_path(index.directory, shard.name), shard) is not None
    }
    missing = [(split, shard) for split, number, shard in shards if (split, number) not in known]
    _hash_missing(index, folder, missing, progress or (lambda done, total: None))
    for split, number, shard in shards:
        of_dataset = read_hashes(hash_path(index.directory, shard.name), shard) if (split, number) in known else None
        if of_dataset is not None:
            yield HashedShard(split, number, of_dataset.of_shard())
        else:
            yield HashedShard(split, number, np.load(_path(folder, split, shard), mmap_mode="r"))


def _hash_missing(
    index: DatasetIndex, folder: Path, shards: list[tuple[str, Shard]], progress: Counted
) -> None:  # fmt: skip
    missing = [(split, shard) for split, shard in shards if not _is_hashed(_path(folder, split, shard), shard)]
    if not missing:
        return
    tasks = [
        _Task(replace(index, splits={split: (shard,)}), split, _path(folder, split, shard)) for split, shard in missing
    ]
    pays = len(tasks) > 1 and sum(shard.bytes for _, shard in missing) >= POOL_FROM_BYTES
    done, total = 0, sum(shard.samples for _, shard in missing)
    progress(done, total)
    with closing(in_processes(_hash_shard, tasks, available_cores() if pays else 1)) as finished:
        for samples in finished:
            done += samples
            progress(done, total)


def restore_hashes(
    index: DatasetIndex, lost: Sequence[tuple[str, int, Sequence[int]]], progress: Counted | None = None
) -> None:
    """Write the hash files of shards, each (split, number of the shard, for each sample the file of the job that it is
    of): lost, or of an earlier version."""
    shards = [index.shards(split)[number] for split, number, _ in lost]
    tasks = [
        _Lost(replace(index, splits={split: (shard,)}), split, np.asarray(files, np.uint32))
        for (split, _, files), shard in zip(lost, shards, strict=True)
    ]
    pays = len(tasks) > 1 and sum(shard.bytes for shard in shards) >= POOL_FROM_BYTES
    with closing(in_processes(_restore, tasks, available_cores() if pays else 1)) as finished:
        for done, _ in enumerate(finished, 1):
            if progress is not None:
                progress(done, len(tasks))


def _path(folder: Path, split: str, shard: Shard) -> Path:
    """Of a tar that stands in several places, its table decides which samples there are: so by all that names it."""
    name = hashlib.sha256(f"{split} {shard.name} {shard.sha256} {shard.samples}".encode()).hexdigest()
    return folder / f"{name[:32]}.npy"


def _is_hashed(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size >= shard.samples * HASHES.itemsize


def hashes_of_shard(index: DatasetIndex, split: str, number: int) -> np.ndarray:
    """(samples,) `HASHES`, each image decoded now; DataError where the shard is not there."""
    shard = index.shards(split)[number]
    reader, hashes = node_reader(index, split), np.zeros(shard.samples, HASHES)
    for sample in range(shard.samples):
        try:
            hashes[sample] = likeness(reader.read(number, sample, verify=False).image).hashes
        except DataError as error:
            if error.cause == "missing":  # the whole shard
                raise
    return hashes


def _hash_shard(task: _Task) -> int:
    """Write the hashes of a shard, whole or not at all; how many samples it has."""
    hashes = hashes_of_shard(task.index, task.split, 0)
    buffer = io.BytesIO()
    np.save(buffer, hashes)
    write_file(task.path, buffer.getvalue())
    return len(hashes)


def _restore(task: _Lost) -> None:
    (shard,) = task.index.shards(task.split)
    rows = np.zeros(shard.samples, EXAMINED)
    rows["hashes"], rows["number"] = hashes_of_shard(task.index, task.split, 0), task.files
    rows["label"], rows["kept"] = node_reader(task.index, task.split).labels(0), True
    write_hashes(hash_path(task.index.directory, shard.name), HashFile(b"", rows), shard)
