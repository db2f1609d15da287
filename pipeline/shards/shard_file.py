"""The bytes of one shard, wherever it lies: on a local disk, in the node's cache, or one request away.

All three have `pread(size, offset)`, fewer bytes than asked only at the shard's end, and `distrust()`, called when the
bytes have turned out wrong and before they are read again.
"""

import os
import time
from collections.abc import Iterator
from functools import partial

from pipeline.errors import DataError
from pipeline.shards.index import Shard
from pipeline.storage.cache import ShardCache
from pipeline.storage.location import Location, Url, read_range, size_of, stream

RENEW_SECONDS = 5.0  # how often a cached shard that is being read has its time of use renewed


class LocalFile:
    """A descriptor that closes when nobody reads it any more."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.pread = partial(os.pread, descriptor)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def distrust(self) -> None:
        """Nothing to forget: a second read asks the file again."""


class RangedFile:
    """A remote shard, one request per sample."""

    def __init__(self, path: Location):
        self._path = path

    def pread(self, size: int, offset: int) -> bytes:
        return read_range(self._path, int(offset), int(size))

    def distrust(self) -> None:
        """Nothing to forget: a second read asks the server again."""


class CachedFile:
    """A remote shard that is read from the cache, and fetched again when it was evicted meanwhile."""

    def __init__(self, cache: ShardCache, path: Location, shard: Shard):
        self._cache, self._path, self._shard = cache, path, shard
        self._file: LocalFile | RangedFile | None = None
        self._renewed = 0.0

    def pread(self, size: int, offset: int) -> bytes:
        for _ in range(3):
            file = self._file or self._fetched()
            content = file.pread(size, offset)
            if len(content) == size or isinstance(file, RangedFile):
                self._renew()
                return content
            self._file = None
        self._file = open_file(self._path, self._shard)  # evicted as fast as it comes
        return self._file.pread(size, offset)

    def distrust(self) -> None:
        """Fetch the shard anew before the next read."""
        self._cache.remove(tar_name(self._shard))
        self._file = None

    def _fetched(self) -> "LocalFile | RangedFile":
        file: LocalFile | RangedFile | None = None
        while file is None:
            if not fetch(self._cache, self._path, self._shard):
                file = open_file(self._path, self._shard)
            elif (descriptor := self._cache.open(tar_name(self._shard))) is not None:
                file = LocalFile(descriptor)
        self._file, self._renewed = file, time.monotonic()
        return file

    def _renew(self) -> None:
        if (now := time.monotonic()) - self._renewed > RENEW_SECONDS:
            self._renewed = now
            self._cache.touch(tar_name(self._shard))


def tar_name(shard: Shard) -> str:
    """What the shard is called in the cache."""
    return shard.sha256 + ".tar"


def fetch(cache: ShardCache, path: Location, shard: Shard) -> bool:
    """Bring the shard into the cache, verified; False where there is no room for it."""

    def content() -> Iterator[bytes]:
        _check_size(path, shard, size_of(path))
        return stream(path, shard.bytes)

    try:
        return cache.fetch(tar_name(shard), shard.bytes, content, shard.sha256, str(path))
    except FileNotFoundError as error:
        raise _cannot_be_opened(path, shard, error) from error
    except DataError as error:
        error.shard = shard.name
        raise


def open_file(path: Location, shard: Shard) -> LocalFile | RangedFile:
    """The shard where it lies."""
    try:
        if isinstance(path, Url):
            _check_size(path, shard, size_of(path))
            return RangedFile(path)
        file = LocalFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        _check_size(path, shard, file.size)
        return file
    except OSError as error:
        raise _cannot_be_opened(path, shard, error) from None


def _check_size(path: Location, shard: Shard, size: int) -> None:
    if size != shard.bytes:
        raise DataError(
            f"{path}: {size} bytes, the index says {shard.bytes}; run `vit check DATASET` and restore the shard",
            cause="cut" if size < shard.bytes else "changed",
            shard=shard.name,
        )


def _cannot_be_opened(path: Location, shard: Shard, error: OSError) -> DataError:
    words = f"{path}: cannot be opened ({words_of(error)}); run `vit check DATASET`"
    return DataError(words, cause="missing", shard=shard.name)


def words_of(error: OSError) -> str:
    """What happened, of an error that may come from a client instead of the kernel."""
    return error.strerror or "No such file"


ShardFile = LocalFile | RangedFile | CachedFile
