"""Files that appear whole or not at all: written under a temporary name, fsynced, renamed.

A temporary file of a killed process stays behind; its name begins with `TEMPORARY_PREFIX`, so that the next writer of
the directory can remove it. The name carries machine and process id, so two writers never share one.
"""

import ctypes
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import BinaryIO

from pipeline.errors import DISK_FULL

TEMPORARY_PREFIX = ".tmp-"
_fallocate = getattr(ctypes.CDLL(None), "fallocate", None)  # Linux alone has it
_MACHINE = hashlib.sha256(gethostname().encode()).hexdigest()[:8]


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that takes the name `path` when the block ends, and vanishes when the block raises.

    An OSError of a full disk names it.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{_MACHINE}-{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_directory(path.parent)


def reserve(file: BinaryIO, num_bytes: int) -> None:
    """Ask the disk for the space of a file that is about to be written from its start, and is then cut to its length.

    So it lies in one piece and is written with a third less of the processor's time (ext4). Only a wish: where the file
    system cannot, or is too full for it, writing goes on as without. Not os.posix_fallocate, which would then write
    every block itself.
    """
    if _fallocate is None or num_bytes > shutil.disk_usage(file.fileno()).free:
        return  # a disk that is too full would be filled up before it refuses, at the cost of all who write to it
    if _fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)):
        os.ftruncate(file.fileno(), 0)  # what it gave before it refused, as where a quota is less than the disk


def write_file(path: Path, content: bytes) -> None:
    with replaced_file(path) as file:
        file.write(content)


def give_usual_rights(path: Path) -> None:
    """Give a file or folder that a library made for its owner alone (safetensors, tempfile) the rights of any other.

    What the umask says, so that in a home of a group the others can read it too.
    """
    status = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
    umask = next((int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:")), 0o022)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask | path.stat().st_mode & 0o7000)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path, older_than_seconds: float = 0) -> None:
    """Remove what killed writers left behind. The caller holds whatever lock guards the directory, or removes only what
    is too old to be still written to."""
    for path in directory.glob(f"{TEMPORARY_PREFIX}*"):
        try:
            if time.time() - path.stat().st_mtime >= older_than_seconds:
                path.unlink()
        except FileNotFoundError:  # another was quicker
            pass
