"""A bounded cache of remote shards on a node's own disk, shared by all its ranks and workers without a server.

A file is named by the sha256 of its content and appears whole: downloaded under `.partial`, verified as it streams,
renamed. The lock is a flock on the partial file itself, so the kernel frees it when a process is killed, one process
downloads while the others wait, and what was left behind is taken over or removed. Room is taken (posix_fallocate)
under the directory's lock before the first byte comes, and a file is cut to nothing before it is removed: the limit
holds at every moment, and readers may keep descriptors open, for a read that comes back short is a miss.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import DataError, InputError
from pipeline.storage.location import MEMORY_FILE_SYSTEMS, file_system_type, is_remote

log = logging.getLogger(__name__)

SHARE_OF_FREE = 0.5  # of what is free on the disk, this cache's own files counted as free
SHARE_OF_MEMORY = 0.1  # the same where the directory is memory (tmpfs), which the job needs itself
PARTIAL = ".partial"
_LOCK_NAME = ".lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_ALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # as on ZFS

Content = Callable[[], Iterable[bytes]]


class ShardCache:
    """Files of at most `limit_bytes` in all in `directory`, which is made when it is missing.

    May be pickled, forked and shared by threads; every process that names the same directory shares it.
    """

    def __init__(self, directory: str | Path, limit_bytes: int):
        self.directory, self.limit_bytes = Path(directory), limit_bytes
        self._warned = False
        _make_private(self.directory)

    def open(self, name: str) -> int | None:
        """A descriptor of a complete file, its time of use renewed; None where it is not here.

        An evicted file that is still open reads short, never wrong.
        """
        try:
            descriptor = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        self.touch(name)
        return descriptor

    def touch(self, name: str) -> bool:
        """Renew the time of use, which eviction goes by; False where the file is not here."""
        try:
            _stamp(self.directory / name)
            return True
        except FileNotFoundError:
            return False

    def remove(self, name: str) -> None:
        """Drop a file whose bytes have turned out wrong."""
        with self._locked():
            _discard(self.directory / name)

    def fetch(self, name: str, size: int, content: Content, sha256: str | None = None, label: str = "") -> bool:
        """Make sure that `name` is here, from `content()` if it must; False where there is no room for it.

        Its time of use is renewed. One process downloads, others that ask for the same file wait for it. DataError
        ("cut", "changed") where the content is not `size` bytes of `sha256`; what `content` raises passes through, and
        leaves nothing behind.
        """
        while not self._complete(name, size):
            _make_private(self.directory)  # temporary directories are swept now and then
            if size > self.limit_bytes:
                return self._no_room(label or name, size, f"the cache holds {self.limit_bytes} bytes")
            with self._partial(name) as descriptor:
                if descriptor is None or self._complete(name, size):
                    continue  # another process finished it, or gave up, while this one waited
                if fault := self._take_room(name, descriptor, size):
                    _discard(self._partial_path(name))
                    return self._no_room(label or name, size, fault)
                try:
                    _fill(descriptor, size, content, sha256, label or name)
                    os.fdatasync(descriptor)  # a name that survives a power cut must not stand for zeros
                    _stamp(descriptor)
                    with self._locked():  # whoever counts files must not miss one between two names
                        os.rename(self._partial_path(name), self.directory / name)
                except BaseException as error:
                    _discard(self._partial_path(name))
                    if isinstance(error, OSError) and error.errno in _NO_ROOM:
                        return self._no_room(label or name, size, f"{self.directory}: {error.strerror}")
                    raise
                return True
        self.touch(name)
        return True

    def used_bytes(self) -> int:
        """Bytes of everything here, downloads under way at their full size."""
        with self._locked():
            return self._used_bytes()

    def _used_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _complete(self, name: str, size: int) -> bool:
        path = self.directory / name
        if (found := _size(path)) == size:
            return True
        if found is not None:
            with self._locked():
                if _size(path) != size:  # not just being evicted, and downloaded again
                    _discard(path)
        return False

    def _partial_path(self, name: str) -> Path:
        return self.directory / (name + PARTIAL)

    @contextmanager
    def _partial(self, name: str) -> Iterator[int | None]:
        """The partial file, locked for this process alone; None where it went away while we waited for the lock."""
        path = self._partial_path(name)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor if _is_at(descriptor, path) else None
            if _is_at(descriptor, path):
                _discard(path)  # nothing came of it
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: a process forked meanwhile holds a copy
            os.close(descriptor)

    def _take_room(self, name: str, descriptor: int, size: int) -> str | None:
        """Allocate the whole file, evicting others for it; else why there is no room."""
        os.ftruncate(descriptor, 0)  # what a killed process had
        with self._locked():
            self._remove_leftovers(except_name=name + PARTIAL)
            if not self._evict(self._used_bytes() + size - self.limit_bytes):
                return f"downloads under way fill its {self.limit_bytes} bytes"
            for again in (True, False):
                try:
                    os.posix_fallocate(descriptor, 0, size)
                    return None
                except OSError as error:
                    os.ftruncate(descriptor, 0)
                    if error.errno in _CANNOT_ALLOCATE:
                        os.ftruncate(descriptor, size)  # counted at least; a full disk shows when it is written
                        return None
                    if error.errno not in _NO_ROOM:
                        raise
                    if not again or not self._evict(size):
                        return f"{self.directory}: {error.strerror}"
        return None

    def _evict(self, excess: int) -> bool:
        """Remove complete files, least recently used first, until `excess` bytes are free; False if they are too few.

        Nothing is removed where removing everything would not do.
        """
        complete = [(used, size, path) for used, size, path in self._files() if path.suffix != PARTIAL]
        if sum(size for _, size, _ in complete) < excess:
            return False
        for _, size, path in sorted(complete):
            if excess <= 0:
                break
            _discard(path)
            excess -= size
        return True

    def _remove_leftovers(self, except_name: str) -> None:
        """Remove the partial files of processes that are no more: those whose lock is free."""
        for path in self.directory.glob(f"*{PARTIAL}"):
            if path.name == except_name:
                continue
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, path):
                    _discard(path)
            except BlockingIOError:
                pass  # its download is under way
            finally:
                os.close(descriptor)

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of use, bytes, path) of every file here but the lock."""
        files = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name != _LOCK_NAME:
                    files.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return files

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _no_room(self, label: str, size: int, fault: str) -> bool:
        if not self._warned:
            self._warned = True
            log.warning(
                "%s: its %d bytes do not fit into the cache (%s); reading it from its origin, sample by sample; "
                "give VIT_SHARD_CACHE a larger disk or raise VIT_SHARD_CACHE_BYTES",
                label, size, fault,
            )  # fmt: skip
        return False


def node_cache() -> ShardCache | None:
    """The cache of this node: `$VIT_SHARD_CACHE`, else `vit-shards-UID` in the temporary directory.

    It holds `$VIT_SHARD_CACHE_BYTES`, else half of what is free there (a tenth where that is memory). None, with a
    warning, where the directory is itself on a network file system. InputError where it cannot be used.
    """
    chosen = os.environ.get("VIT_SHARD_CACHE")
    directory = Path(chosen or Path(tempfile.gettempdir(), f"vit-shards-{os.getuid()}"))
    _make_private(directory)
    if is_remote(directory):
        log.warning("%s: on a network file system, so not used as a cache; set VIT_SHARD_CACHE to a disk", directory)
        return None
    return ShardCache(directory, _limit_bytes(directory))


def _limit_bytes(directory: Path) -> int:
    if text := os.environ.get("VIT_SHARD_CACHE_BYTES"):
        if not text.isdecimal() or int(text) == 0:
            raise InputError(f"VIT_SHARD_CACHE_BYTES={text}: not a number of bytes above 0; correct or unset it")
        return int(text)
    own = ShardCache(directory, 0).used_bytes()
    share = SHARE_OF_MEMORY if file_system_type(directory) in MEMORY_FILE_SYSTEMS else SHARE_OF_FREE
    return int(share * (shutil.disk_usage(directory).free + own))


def _make_private(directory: Path) -> None:
    """The directory, ours alone: names in a shared temporary directory are anybody's to take first."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(directory)
    except OSError as error:
        raise InputError(
            f"{directory}: cannot hold the shard cache ({error.strerror}); set VIT_SHARD_CACHE to another directory"
        ) from None
    if status.st_uid != os.getuid():
        owner = f"belongs to user {status.st_uid}, not to {os.getuid()}"
        raise InputError(f"{directory}: {owner}; set VIT_SHARD_CACHE to another directory")
    if status.st_mode & 0o022:
        raise InputError(
            f"{directory}: others may write to it; chmod 700 it, or set VIT_SHARD_CACHE to another directory"
        )


def _fill(descriptor: int, size: int, content: Content, sha256: str | None, label: str) -> None:
    """Write and verify; a wrong checksum gets a second try, in case the network did it."""
    for last in (False, True):
        digest, reached = hashlib.sha256(), 0
        for piece in content():
            if reached + len(piece) > size:
                raise DataError(f"{label}: longer than the {size} bytes of the index; restore it", cause="changed")
            _write(descriptor, piece, reached)
            digest.update(piece)
            reached += len(piece)
        if reached < size:
            raise DataError(f"{label}: {reached} bytes, the index says {size}; restore the shard", cause="cut")
        if sha256 in (None, digest.hexdigest()):
            return
        if last:
            raise DataError(
                f"{label}: its bytes have changed: sha256 {digest.hexdigest()}, the index says {sha256}; "
                "restore the shard",
                cause="changed",
            )


def _write(descriptor: int, piece: bytes, offset: int) -> None:
    view = memoryview(piece)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _stamp(file: Path | int) -> None:
    """Used now. The kernel's own stamp is some milliseconds coarse, too coarse for an order of use."""
    os.utime(file, ns=(time.time_ns(),) * 2)


def _discard(path: Path) -> None:
    """Remove a file and free its bytes now, whoever has it open."""
    try:
        os.truncate(path, 0)
        path.unlink()
    except FileNotFoundError:
        pass
