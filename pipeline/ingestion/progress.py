"""How an ingestion tells how far it is."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

INGESTING = "ingesting"  # files; whatever else is counted may come before and after


class Progress(Protocol):
    def __call__(self, done: int, total: int, rejected: int, what: str = INGESTING) -> None:
        """So much of `total` is done; `rejected` images of it were rejected."""


Counted = Callable[[int, int], None]  # (done, in all) of one thing


def untold(done: int, total: int, rejected: int, what: str = INGESTING) -> None:
    """To nobody."""


def counted(progress: Progress, what: str) -> Counted:
    """Tells `progress` of something of which nothing is rejected."""
    return partial(_tell, progress, what)


def _tell(progress: Progress, what: str, done: int, total: int) -> None:
    progress(done, total, 0, what)
