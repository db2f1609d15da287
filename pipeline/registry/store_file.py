"""Database files in a folder that a group shares: sqlite makes them for their owner to write, whatever the umask."""

import contextlib
import os
import pwd
import stat
from pathlib import Path

from pipeline.errors import InputError
from pipeline.registry.versions import CORRECT, sqlite_file

BESIDE = ("", "-wal", "-shm", "-journal")  # what sqlite keeps beside a database, with the database's rights


def share_store(uri: str) -> None:
    """Let the group write the file of an sqlite store where it may write the folder; other stores are left alone."""
    if (file := sqlite_file(uri)) is not None:
        share_database(file)


def share_database(file: Path) -> None:
    """Make the file before sqlite does, for the group where the folder is the group's; mend one that is ours already.

    Does nothing where the folder is one person's, is not there, or is everybody's (/tmp).
    """
    with contextlib.suppress(OSError):  # what opens it then says what is wrong
        folder = file.parent.stat().st_mode
        if not folder & stat.S_IWGRP or folder & stat.S_ISVTX:
            return
        rights = 0o660 | (0o004 if folder & stat.S_IROTH else 0)
        os.close(os.open(file, os.O_CREAT | os.O_RDONLY, rights))
        for name in (f"{file}{end}" for end in BESIDE):
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(name)
                if there.st_uid == os.getuid() and there.st_mode & 0o060 != 0o060:
                    os.chmod(name, there.st_mode | 0o060)


def require_writable_store(uri: str) -> None:
    """InputError where the file of an sqlite store is there and this person may not write it, or not its folder."""
    file = sqlite_file(uri)
    if file is None or not file.exists():
        return
    share_database(file)
    for path in (*(Path(f"{file}{end}") for end in BESIDE), file.parent):
        if path.exists() and not os.access(path, os.W_OK):
            rights = stat.filemode(path.stat().st_mode)
            raise InputError(
                f"MLflow store {path}: it is {_name(path.stat().st_uid)}'s and not yours to write ({rights}); have "
                f"them run `chmod g+rw{'x' if path.is_dir() else ''} {path}`, or {CORRECT}"
            )


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:  # of a container, or another machine
        return f"user {user}"
