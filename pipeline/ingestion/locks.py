"""Locks that the kernel frees, however their process ends: by them ingestions keep apart in one directory."""

import fcntl
from pathlib import Path
from typing import IO

from pipeline.errors import InputError


def locked(file: IO[bytes], directory: Path) -> bool:
    """Whether `file`, of `directory`, is ours alone now, until it is closed; InputError where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(
            f"{directory}: its file system has no locks ({error.strerror}), by which two ingestions keep apart; name a "
            "directory on another one, or have it mounted with them (Lustre: -o flock)"
        ) from None
    return True
