"""Random access to the samples of one split, by offset; knows no order and no training.

A shard on a local disk is read where it lies. A remote one (a URL, a network file system) is read from the node's
cache, into which it comes whole; without a cache or room in it, by one ranged request per sample. Sizes are checked on
every read and checksums when asked (0.03 ms for 110 kB), so a cut, changed or swapped shard is a `DataError` that names
it and never fewer samples. Plain reads, no memory maps: a shard cut under a running job is an error in Python and not a
SIGBUS. Readers may be pickled, forked and shared by threads.
"""

import hashlib
import json
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.errors import Cause, DataError
from pipeline.shards.annotations import MASK_EXTENSION
from pipeline.shards.index import DatasetIndex, Shard
from pipeline.shards.order import bytes_at_a_time
from pipeline.shards.shard_file import CachedFile, ShardFile, fetch, open_file, tar_name, words_of
from pipeline.shards.table import ShardTable, parse_table, read_table, split_member
from pipeline.shards.tombstones import Tombstone
from pipeline.storage.cache import ShardCache, node_cache
from pipeline.storage.location import Location, is_remote, read_bytes
from pipeline.words import bytes_in_words

_REMEDY = "run `vit check DATASET --full` and restore the shard"


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
    `remote` says whether shards are far away; None: as `is_remote` finds.
    """

    def __init__(
        self,
        index: DatasetIndex,
        split: str,
        cache: ShardCache | None = None,
        *,
        max_open_shards: int = 256,
        remote: bool | None = None,
    ):
        self._index, self._split, self._cache = index, split, cache
        self._max_open_shards, self._remote = max_open_shards, remote
        self._shards = index.shards(split)
        self._left_out: frozenset[tuple[int, int]] | None = None  # not looked up yet
        self._forget()

    def __reduce__(self) -> tuple:
        options = {"max_open_shards": self._max_open_shards, "remote": self._remote}
        return partial(ShardReader, **options), (self._index, self._split, self._cache)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples per shard, for `SampleOrder`."""
        return np.array([shard.samples for shard in self._shards], dtype=np.int64)

    @property
    def has_label_sets(self) -> bool:
        """Whether a label stands for several classes, or none."""
        return self._index.label_sets is not None

    def read(self, shard: int, sample: int, *, verify: bool = True) -> Sample:
        """One sample, its size checked, and its checksum with `verify`.

        DataError where the shard is not what the index says, FaultError where its server does not answer.
        """
        opened = self._opened_for(shard, sample)
        offset, _, size, _, checksum, label, _ = opened.table.records[sample].item()  # quicker than by name
        member = opened.table.member(sample)
        image = opened.read(offset, size, member)
        if verify and crc32(image) != checksum:
            opened.file.distrust()
            image = opened.read(offset, size, member)
            if crc32(image) != checksum:
                raise opened.error(member, "its bytes have changed since it was ingested", "changed")
        key, extensions = split_member(member)
        return Sample(key, image, extensions.rpartition(".")[2], label, opened.name)

    def keys(self, shard: int) -> list[str]:
        """Keys of all samples of a shard, from its table alone."""
        table = self._open(shard).table
        return [table.key(sample) for sample in range(len(table))]

    def labels(self, shard: int) -> np.ndarray:
        """(samples,) int64 labels of a shard, -1 where there is none, from its table alone."""
        return self._open(shard).table.records["label"].astype(np.int64)

    def left_out(self) -> frozenset[tuple[int, int]]:
        """(shard, sample) of what the dataset's tombstone list leaves out of this split; looked up once."""
        if self._left_out is None:
            stones = (stone for stone in self._index.tombstones if stone.split == self._split)
            self._left_out = frozenset(place for stone in stones for place in self.places_of_tombstone(stone))
        return self._left_out

    def places_of_tombstone(self, stone: Tombstone) -> list[tuple[int, int]]:
        """(shard, sample) of its key: in its shard, or where it is not there any more, in any."""
        shards = [number for number, shard in enumerate(self._shards) if shard.name == stone.shard]
        return self.places_of_key(stone.key, shards) or self.places_of_key(stone.key)

    def places_of_key(self, key: str, shards: Iterable[int] | None = None) -> list[tuple[int, int]]:
        """(shard, sample) of a key in some shards, or in all: one or none, but for adopted tars that repeat keys."""
        shards = range(len(self._shards)) if shards is None else shards
        return [(shard, sample) for shard in shards for sample in self._open(shard).table.samples_of_key(key)]

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
            raise opened.error(opened.table.member(sample), "its .json is not valid", "undecodable") from None

    def mask(self, shard: int, sample: int) -> bytes | None:
        """The .mask.png behind the .json of a sample, None where there is none. DataError where it has changed."""
        opened = self._open(shard)
        row, member = opened.table.records[sample], opened.table.member(sample)
        if not row["json_bytes"]:
            return None
        start = int(row["json_offset"]) + int(row["json_bytes"])
        start += -start % tarfile.BLOCKSIZE
        try:
            header = tarfile.TarInfo.frombuf(opened.read(start, tarfile.BLOCKSIZE, member), "utf-8", "surrogateescape")
        except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):
            return None
        except tarfile.HeaderError as error:
            raise opened.error(member, f"no tar header behind its .json ({error})", "changed") from None
        if header.name != f"{opened.table.key(sample)}.{MASK_EXTENSION}":
            return None
        content = opened.read(start + tarfile.BLOCKSIZE, header.size, member)
        expected = self.record(shard, sample).get("mask_sha256")
        if expected is not None and hashlib.sha256(content).hexdigest() != expected:
            raise opened.error(member, "its mask has changed since it was ingested", "changed")
        return content

    def shard_bytes(self, shard: int) -> int:
        """Bytes of the tar."""
        return self._shards[shard].bytes

    def is_staged(self, shard: int) -> bool:
        """Whether the shard is in the cache; its time of use is renewed."""
        return self._cache is not None and self._cache.touch(tar_name(self._shards[shard]))

    def goes_through_cache(self, shard: int) -> bool:
        return self._goes_through_cache(self._index.shard_path(self._shards[shard]))

    def any_goes_through_cache(self) -> bool:
        return any(self.goes_through_cache(shard) for shard in range(len(self._shards)))

    def stage(self, shard: int) -> bool:
        """Bring a shard and its table into the cache; False where it is read where it lies. Raises as `read` does."""
        path = self._index.shard_path(self._shards[shard])
        if not self._goes_through_cache(path):
            return False
        self._table(self._shards[shard])
        return fetch(self._cache, path, self._shards[shard])

    def without_cache(self) -> "ShardReader":
        """A reader of the same shards where they lie."""
        return ShardReader(self._index, self._split, max_open_shards=self._max_open_shards, remote=self._remote)

    def close(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def _opened_for(self, shard: int, sample: int) -> "_OpenShard":
        """The open shard; a DataError says which sample was wanted, where the table does."""
        try:
            return self._open(shard)
        except DataError as error:
            try:
                key = self._table(self._shards[shard]).key(sample)
            except DataError:
                raise error from None
            raise DataError(f"{error} (met at sample `{key}`)", cause=error.cause, shard=error.shard, key=key) from None

    def _open(self, shard: int) -> "_OpenShard":
        if self._process != os.getpid():
            self._forget()  # in a fork: the lock may have been held by a thread that is not here
        with self._lock:
            opened = self._opened.get(shard)
            if opened is not None:
                self._opened.move_to_end(shard)
                return opened
        opened = self._open_anew(self._shards[shard])  # may wait for a server, so without the lock
        with self._lock:
            opened = self._opened.setdefault(shard, opened)
            self._opened.move_to_end(shard)
            if len(self._opened) > self._max_open_shards:
                self._opened.popitem(last=False)  # its file closes when the last thread that reads it lets go
            return opened

    def _open_anew(self, shard: Shard) -> "_OpenShard":
        path = self._index.shard_path(shard)
        table = self._table(shard)
        if self._goes_through_cache(path):
            return _OpenShard(path, shard.name, table, CachedFile(self._cache, path, shard))
        return _OpenShard(path, shard.name, table, open_file(path, shard))

    def _goes_through_cache(self, path: Location) -> bool:
        return self._cache is not None and (is_remote(path) if self._remote is None else self._remote)

    def _table(self, shard: Shard) -> ShardTable:
        path = self._index.table_path(shard)
        try:
            table = self._cached_table(shard, path) if self._goes_through_cache(path) else read_table(path)
            if (len(table), table.shard_bytes, table.shard_sha256) != (shard.samples, shard.bytes, shard.sha256):
                raise DataError(
                    f"{path}: belongs to another version of its shard; ingest the dataset again", cause="changed"
                )
        except DataError as error:
            error.shard = shard.name
            raise
        return table

    def _cached_table(self, shard: Shard, path: Location) -> ShardTable:
        # By the fingerprint too, which covers labels: the same tar may stand in two datasets with different ones.
        identity = f"{self._index.fingerprint} {shard.sha256} {shard.name}"
        name = hashlib.sha256(identity.encode()).hexdigest() + ".idx"
        if (descriptor := self._cache.open(name)) is not None:
            with open(descriptor, "rb") as file:
                content = file.read()
            try:
                return parse_table(content, path)
            except DataError:
                self._cache.remove(name)  # evicted while it was read, or damaged
        try:
            content = read_bytes(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({words_of(error)}); ingest the dataset again", cause="missing"
            ) from None
        table = parse_table(content, path)
        self._cache.fetch(name, len(content), lambda: [content], label=str(path))
        return table


def node_reader(index: DatasetIndex, split: str) -> ShardReader:
    """The reader of a job on this node: remote shards through the node's cache. InputError as `node_cache` says."""
    (reader,), _ = node_readers([index], split)
    return reader


def node_readers(indexes: Sequence[DatasetIndex], split: str) -> tuple[list[ShardReader], ShardCache | None]:
    """One reader per dataset, and the cache that they share; None where nothing is remote."""
    paths = (index.shard_path(shard) for index in indexes for shard in index.shards(split))
    folders = {path.parent if isinstance(path, Path) else path for path in paths}
    cache = node_cache() if any(map(is_remote, folders)) else None
    return [ShardReader(index, split, cache) for index in indexes], cache


def cache_shortage(
    readers: Sequence[ShardReader], windows: Sequence[int], lanes: int, cache: ShardCache | None
) -> str | None:
    """In words, that the cache cannot hold the windows of a node's lanes; None where it can, or there is none.

    Every sample would evict a shard that the next one needs.
    """
    if cache is None:
        return None
    needed = sum(
        bytes_at_a_time([reader.shard_bytes(shard) for shard in range(len(reader.shard_sizes))], lanes, window)
        for reader, window in zip(readers, windows, strict=True)
    )
    if needed <= cache.limit_bytes:
        return None
    return (
        f"the shard cache {cache.directory} may hold {bytes_in_words(cache.limit_bytes)} and the {lanes} lanes of this "
        f"node read {bytes_in_words(needed)} at a time: samples are read one by one where the shards lie, slowly; "
        "raise VIT_SHARD_CACHE_BYTES, lower data.window_shards or data.lanes, or use more nodes"
    )


class _OpenShard:
    """A shard that is being read: `file` gives bytes, fewer than asked only at its end."""

    def __init__(self, path: Location, name: str, table: ShardTable, file: ShardFile):
        self.path, self.name, self.table, self.file = path, name, table, file

    def read(self, offset: int, size: int, member: str) -> bytes:
        try:
            content = self.file.pread(size, offset)
        except OSError as error:
            raise self.error(member, f"cannot be read ({words_of(error)})", "missing") from error
        except DataError as error:
            error.shard, error.key = self.name, split_member(member)[0]
            raise
        if len(content) != size:
            raise self.error(member, f"the shard ends {size - len(content)} bytes before the sample does", "cut")
        return content

    def error(self, member: str, fault: str, cause: Cause) -> DataError:
        message = f"{self.path}: sample `{member}`: {fault}; {_REMEDY}"
        return DataError(message, cause=cause, shard=self.name, key=split_member(member)[0])
