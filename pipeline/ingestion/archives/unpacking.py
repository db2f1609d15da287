"""Compressed tars have no offsets to read at, so each is unpacked once into a hidden file of the dataset's directory.

The files are removed when the ingestion ends, however it ends; those of a killed one by the next ingestion there. The
lock on each is the kernel's to free, so that nobody removes what another still reads.
"""

import bz2
import gzip
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DISK_FULL, InputError
from pipeline.ingestion.locks import locked
from pipeline.storage.location import Location
from pipeline.storage.random_access import open_random

UNPACKED_PREFIX = ".unpacked-"
LOCK_NAME = "lock"  # of a folder
PIECE_BYTES = 4 << 20
MOST_TIMES = 200  # its own size that a compressed tar may unpack to: raw pixels of one colour reach some 100 ...
SURELY_BYTES = 64 << 20  # ... and this it may whatever its size
SPARED_BYTES = 1 << 30  # of the disk, for whoever else writes there; of a small one a hundredth


class Scratch:
    """Room for unpacked tars in `directory`, which is made when the first one comes. A context manager."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._made = False
        self._files: dict[Path, IO[bytes]] = {}
        self._folder: tuple[Path, IO[bytes]] | None = None

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *exception: object) -> None:
        for path, file in self._files.items():
            file.truncate(0)  # frees the disk now, whoever in this process still has it open
            path.unlink(missing_ok=True)
            file.close()
        if self._folder is not None:
            shutil.rmtree(self._folder[0], ignore_errors=True)
            self._folder[1].close()
        if self._made and not os.listdir(self.directory):
            self.directory.rmdir()

    def folder(self) -> Path:
        """An absolute folder for whatever a source lays out, by any process that works for this ingestion."""
        if self._folder is None:
            self._begin()
            path = self.directory.absolute() / f"{UNPACKED_PREFIX}{os.getpid()}-tables"
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            lock = open(path / LOCK_NAME, "wb")
            self._folder = path, lock
            locked(lock, self.directory)
        return self._folder[0]

    def _begin(self) -> None:
        new = not self.directory.exists()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.directory}: cannot be made ({error.strerror})") from None
        self._made |= new
        remove_unpacked(self.directory)

    def unpack(self, tar: Location) -> Path:
        """The plain tar that `tar` holds; InputError where it holds none, or the disk is full."""
        self._begin()
        path, file = self._new_file()
        try:
            with open_random(tar) as packed, _opened(tar, packed) as plain:
                self._copy(plain, file, tar, max(SURELY_BYTES, MOST_TIMES * packed.size))
            file.flush()
        except OSError as error:
            if error.errno in DISK_FULL:
                raise self._no_room(tar, error.strerror) from None
            raise _damaged(tar, error) from None
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise _damaged(tar, error) from None
        return path

    def _copy(self, plain: IO[bytes], file: IO[bytes], tar: Location, most_bytes: int) -> None:
        """InputError before more than `most_bytes` are written, or the last of the disk."""
        written = 0
        while piece := plain.read(PIECE_BYTES):
            written += len(piece)
            if written > most_bytes:
                raise InputError(
                    f"{tar}: unpacks to more than {most_bytes >> 20} MiB, {MOST_TIMES} times its size, as a bomb does; "
                    "if it is none, unpack it yourself, and ingest the folder, or the plain tar, which is read in place"
                )
            disk = shutil.disk_usage(self.directory)
            if disk.free - len(piece) < min(SPARED_BYTES, disk.total // 100):
                raise self._no_room(tar, f"{disk.free >> 20} MiB are free")
            file.write(piece)

    def _no_room(self, tar: Location, why: str | None) -> InputError:
        return InputError(
            f"{self.directory}: no room to unpack {tar} ({why}); unpack it where there is, and ingest the folder, or "
            "the plain tar, which is read in place"
        )

    def _new_file(self) -> tuple[Path, IO[bytes]]:
        while True:
            descriptor, name = tempfile.mkstemp(dir=self.directory, prefix=UNPACKED_PREFIX, suffix=".tar")
            file = open(descriptor, "wb")
            self._files[Path(name)] = file
            if locked(file, self.directory) and os.path.exists(name):
                return Path(name), file
            self._files.pop(Path(name)).close()  # another ingestion took it for left behind


def remove_unpacked(directory: Path) -> None:
    """Remove what killed ingestions left behind."""
    for path in directory.glob(f"{UNPACKED_PREFIX}*"):
        try:
            with open(path / LOCK_NAME if path.is_dir() else path, "ab") as file:  # NFS locks what may be written
                if locked(file, directory):  # else it is in use
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # another was quicker
            pass


def _damaged(tar: Location, error: Exception) -> InputError:
    return InputError(f"{tar}: does not unpack ({error or type(error).__name__}); fetch it again")


def _opened(tar: Location, packed: Any) -> Any:
    name = tar.name.lower()
    openers: dict[tuple[str, ...], Callable[[Any], Any]] = {
        (".gz", ".tgz"): gzip.open, (".bz2", ".tbz2"): bz2.open, (".xz", ".txz"): lzma.open
    }  # fmt: skip
    if opener := next((opener for suffixes, opener in openers.items() if name.endswith(suffixes)), None):
        return opener(packed)
    import pyarrow  # its codec, as Python has none before 3.14

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")
