"""The folder of an export: written as DEST.partial beside it, and renamed when it is whole and judged."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DISK_FULL, FaultError, InputError, RefusedError
from pipeline.ingestion.locks import locked
from pipeline.shards.atomic import sync_directory
from pipeline.words import bytes_in_words

LOCK = ".export-lock"


def require_new(destination: Path) -> None:
    """InputError where DEST is neither new nor an empty folder, or lies in a run directory."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        what = "is not empty" if destination.is_dir() else "is a file"
        raise InputError(f"DEST `{destination}` {what}; name a new folder")
    for parent in destination.parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"DEST `{destination}`: {parent} is a file; name a new folder elsewhere")
        if (parent / "config.yaml").is_file() and (parent / "plan.json").is_file():
            raise InputError(f"DEST `{destination}` lies in the run directory {parent}; name a folder outside of it")


def require_writable(destination: Path) -> None:
    """InputError where the folder that DEST would lie in cannot be written; asked by writing there."""
    parent = next(one for one in destination.parents if one.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".vit-export-", dir=parent))
    except OSError as error:
        raise InputError(
            f"DEST `{destination}`: its parent {parent} cannot be written ({error.strerror}); name a folder elsewhere"
        ) from None


def require_unused(destination: Path) -> None:
    """InputError where an export, of whichever home, writes DEST at this moment."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(partial_of(destination) / LOCK, "rb") as lock:
        if not locked(lock, destination.parent):
            raise InputError(_in_use(destination))


def _in_use(destination: Path) -> str:
    return f"DEST `{destination}`: another export writes there; wait for it, or name another DEST"


def partial_of(destination: Path) -> Path:
    return destination.with_name(destination.name + ".partial")


@contextlib.contextmanager
def partial_folder(destination: Path, need_bytes: int) -> Iterator[Path]:
    """An empty folder of this process alone; it becomes `destination` by `publish`, and is gone when the block ends.

    What a killed export left of it is removed first. InputError where another export writes there now, or where
    somebody else's folder has its name; FaultError where there is no room for `need_bytes`.
    """
    partial = partial_of(destination)
    partial.mkdir(parents=True, exist_ok=True)
    if any(partial.iterdir()) and not (partial / LOCK).is_file():
        raise InputError(f"{partial}: is in the way and no unfinished export; move it, or name another DEST")
    with open(partial / LOCK, "ab") as lock:
        if not locked(lock, partial):
            raise InputError(_in_use(destination))
        _emptied(partial)
        try:
            _require_room(partial, need_bytes)
            yield partial
        except (RefusedError, InputError, FaultError):
            raise
        except Exception as error:
            if _of_full_disk(error):
                raise FaultError(f"{partial.parent}: the disk is full; make room, and run it again") from None
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _of_full_disk(error: BaseException) -> bool:
    """Whether a full disk is behind it: also libraries that have errors of their own repeat the system's words."""
    return getattr(error, "errno", None) in DISK_FULL or any(os.strerror(number) in str(error) for number in DISK_FULL)


def _emptied(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _require_room(partial: Path, need_bytes: int) -> None:
    if (free := shutil.disk_usage(partial).free) < need_bytes:
        raise FaultError(
            f"{partial.parent}: has {bytes_in_words(free)} free and the export needs {bytes_in_words(need_bytes)}; "
            "make room, and run it again"
        )


def publish(partial: Path, destination: Path) -> None:
    """Let a whole export take its name; every byte is on the disk before."""
    for file in partial.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    require_new(destination)
    (partial / LOCK).unlink()
    os.replace(partial, destination)
    sync_directory(destination.parent)
