"""Children that do not outlive their parent, however it ends (Linux)."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """In a child: be killed when the parent ends, kill -9 included; at once where it (`parent`, its pid) is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def serve_parent(parent: int) -> None:
    """In a helper process of a rank: die with it, and leave stop requests to it, which has a checkpoint to write."""
    die_with_parent(parent)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
