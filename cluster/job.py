"""The face of every place that runs jobs: submit, find by key, state, log from an offset, cancel.

A job is an opaque command with a run directory; nothing here knows what it does. The durable unit is the job: it is
looked for by key before it is submitted, and outlives whoever submitted it.
"""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class JobState(enum.Enum):
    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"  # the place did not answer; never to be read as failed


@dataclass(frozen=True)
class Job:
    """One submitted job. `id` is the place's own name for it."""

    kind: str
    id: str
    key: str
    attempt: int


@dataclass(frozen=True)
class JobRequest:
    """What to run. `key` is deterministic, so that the same request is never submitted twice.

    On this machine the command starts with SIGTERM, SIGUSR1 and SIGINT blocked and unblocks them once it can answer:
    a stop that is asked for while it starts waits for it.
    """

    key: str
    command: tuple[str, ...]
    directory: Path
    attempt: int
    environment: dict[str, str]
    log: Path


class Launcher(Protocol):
    def submit(self, request: JobRequest) -> Job:
        """Start the job, or return the living one of the same key."""

    def find(self, directory: Path) -> Job | None:
        """The newest job of a run directory, whether it lives or not."""

    def state(self, job: Job) -> JobState: ...

    def log(self, request_log: Path, offset: int) -> tuple[str, int]:
        """Text of the job's log from a byte offset, and the offset after it."""

    def cancel(self, job: Job, grace_seconds: float) -> None:
        """Ask the job to stop, wait for the grace, then end it by force."""
