"""Children that do not outlive their parent, however it ends (Linux)."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


@contextmanager
def stops_held() -> Iterator[None]:
    """Within, a request to stop waits: for the end of it, and in children started meanwhile until they unblock it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def die_with_parent(parent: int | None = None) -> None:
    """In a child: be killed when the parent ends, kill -9 included; at once where it (`parent`, its pid) is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def serve_parent(parent: int) -> None:
    """In a helper process of a rank: die with it, and leave stop requests to it, which has a checkpoint to write."""
    die_with_parent(parent)
    ignore_stops()


def ignore_stops() -> None:
    """From now on, also those that are held."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
