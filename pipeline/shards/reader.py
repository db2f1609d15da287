"""Random access to the samples of one split, by offset; knows no order and no training.

Every image is checked against the checksum in its table (0.03 ms for 110 kB), so a cut, changed or swapped shard is a
`DataError` that names it and never fewer samples. Plain reads, no memory maps: a shard cut under a running job is an
error in Python and not a SIGBUS. Readers may be pickled, forked and shared by threads.
"""

import json
import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.shards.index import DatasetIndex, Shard
from pipeline.shards.table import DataError, ShardTable, read_table, split_member

__all__ = ["DataError", "Sample", "ShardReader"]


class Sample(NamedTuple):
    """One image as it lies in the shard. `label` is -1 where there is none."""

    key: str
    image: bytes
    extension: str
    label: int
    shard: str


class ShardReader:
    """Reads samples of one split by (shard, sample), the numbers that `SampleOrder` gives.

    At most `max_open_shards` are open at a time, those used last; each costs a file descriptor and its table.
    """

    def __init__(self, index: DatasetIndex, split: str, max_open_shards: int = 256):
        self._index, self._split, self._max_open_shards = index, split, max_open_shards
        self._shards = index.shards(split)
        self._forget()

    def __reduce__(self) -> tuple:
        return ShardReader, (self._index, self._split, self._max_open_shards)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples per shard, for `SampleOrder`."""
        return np.array([shard.samples for shard in self._shards], dtype=np.int64)

    def read(self, shard: int, sample: int, *, verify: bool = True) -> Sample:
        opened = self._open(shard)
        row = opened.table.records[sample]
        member = opened.table.member(sample)
        image = opened.read(row["image_offset"], row["image_bytes"], member)
        if verify and zlib.crc32(image) != row["image_crc32"]:
            raise opened.error(member, "its bytes have changed since it was ingested")
        key, extensions = split_member(member)
        return Sample(key, image, extensions.rpartition(".")[2], int(row["label"]), self._shards[shard].name)

    def keys(self, shard: int) -> list[str]:
        """Keys of all samples of a shard, from its table alone."""
        table = self._open(shard).table
        return [table.key(sample) for sample in range(len(table))]

    def labels(self, shard: int) -> np.ndarray:
        """(samples,) int64 labels of a shard, -1 where there is none, from its table alone."""
        return self._open(shard).table.records["label"].astype(np.int64)

    def record(self, shard: int, sample: int) -> dict[str, Any]:
        """The .json of a sample; empty for an adopted sample that has none."""
        opened = self._open(shard)
        row = opened.table.records[sample]
        if not row["json_bytes"]:
            return {}
        content = opened.read(row["json_offset"], row["json_bytes"], opened.table.member(sample))
        try:
            return json.loads(content)
        except ValueError:
            raise opened.error(opened.table.member(sample), "its .json is not valid") from None

    def close(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def _open(self, shard: int) -> "_OpenShard":
        if self._process != os.getpid():
            self._forget()  # in a fork: the lock may have been held by a thread that is not here
        with self._lock:
            opened = self._opened.get(shard)
            if opened is None:
                opened = self._opened[shard] = _open_shard(self._index, self._shards[shard])
                if len(self._opened) > self._max_open_shards:
                    self._opened.popitem(last=False)  # its file closes when the last thread that reads it lets go
            self._opened.move_to_end(shard)
            return opened


class _OpenShard:
    def __init__(self, path: Path, table: ShardTable, descriptor: int):
        self.path, self.table, self._descriptor = path, table, descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size: int, member: str) -> bytes:
        try:
            content = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise self.error(member, f"cannot be read ({error.strerror})") from error
        if len(content) != size:
            raise self.error(member, f"the shard ends {size - len(content)} bytes before the sample does")
        return content

    def error(self, member: str, fault: str) -> DataError:
        remedy = "run `vit check DATASET --full` and restore the shard"
        return DataError(f"{self.path}: sample `{member}`: {fault}; {remedy}")


def _open_shard(index: DatasetIndex, shard: Shard) -> _OpenShard:
    path = index.shard_path(shard)
    table = read_table(index.table_path(shard))
    if (len(table), table.shard_bytes, table.shard_sha256) != (shard.samples, shard.bytes, shard.sha256):
        raise DataError(f"{index.table_path(shard)}: belongs to another version of its shard; ingest the dataset again")
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); run `vit check DATASET`") from None
    opened = _OpenShard(path, table, descriptor)
    size = os.fstat(descriptor).st_size
    if size != shard.bytes:
        sizes = f"{size} bytes, the index says {shard.bytes}"
        raise DataError(f"{path}: {sizes}; run `vit check DATASET` and restore the shard")
    return opened
