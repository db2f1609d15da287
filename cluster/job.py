"""The face of every place that runs jobs: submit, find by key, state, log from an offset, cancel.

A job is an opaque command with a run directory; nothing here knows what it does. The durable unit is the job: it is
looked for by key before it is submitted, and outlives whoever submitted it.
"""

import contextlib
import enum
import fcntl
import getpass
import json
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

JOB_FILE = "job.json"
STOP_FILE = "stop.json"


class JobState(enum.Enum):
    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"  # the place did not answer; never to be read as failed


class SubmitError(Exception):
    """The place refused a job, or did not answer; the message is one line with the place's own reason."""


class CancelError(Exception):
    """It could not be confirmed that a job is gone; the message is one line."""


@dataclass(frozen=True)
class Job:
    """One submitted job. `id` is the place's own name for it."""

    kind: str
    id: str
    key: str
    attempt: int
    directory: Path | None = field(default=None, compare=False)  # the run directory; not written to job.json


@dataclass(frozen=True)
class JobRequest:
    """What to run. `key` is deterministic, so that the same request is never submitted twice.

    On this machine the command starts with SIGTERM, SIGUSR1 and SIGINT blocked and unblocks them once it can answer:
    a stop that is asked for while it starts waits for it. On a cluster it starts with SIGUSR1 ignored.
    """

    key: str
    directory: Path
    command: tuple[str, ...]
    """One node's supervisor."""
    environment: dict[str, str]
    attempt: int
    """On this machine the attempt to make. On a cluster attempts are numbered when they start; the newest so far."""
    log: Path
    """On this machine the supervisor's output. A cluster writes RUN/submit/ instead."""
    verdict_command: tuple[str, ...] = ()
    """Run once after `command`, on the first node; its exit code is the job's."""
    preflight_command: tuple[str, ...] = ()
    """Run on all nodes before `command`, where the profile asks for it."""
    stop_lead_seconds: float = 120.0
    """How long before the time limit the job is asked to stop."""
    shared_memory_bytes: int = 0
    """What the processes of one node may share in /dev/shm, where a container has to be given it."""
    reads: tuple[str, ...] = ()
    """Paths of what it reads beside the run directory: they must be there where it runs."""


class Launcher(Protocol):
    kind: str

    def submit(self, request: JobRequest) -> Job:
        """Start the job, or return the living one of the same key. Raises SubmitError."""

    def render(self, request: JobRequest) -> dict[str, str]:
        """What would be run: text by file name. Nothing is written, nobody is asked."""

    def objections(self, request: JobRequest) -> tuple[list[str], list[str]]:
        """What is wrong with what is rendered, and why it could not be submitted from here; a line each.

        Nothing is submitted. A place that can be asked is, where it answers.
        """

    def find(self, directory: Path) -> Job | None:
        """The newest job of a run directory, whether it lives or not."""

    def state(self, job: Job) -> JobState: ...

    def explain(self, job: Job) -> str:
        """One line for people: the place's own state, reason, nodes, time; empty where there is nothing to say."""

    def log(self, job_or_path: Job | Path, offset: int) -> tuple[str, int]:
        """Text of the job's log from a byte offset, and the offset after it."""

    def cancel(self, job: Job, grace_seconds: float) -> None:
        """Ask the job to stop, wait for the grace, then end it by force. Raises CancelError where it may live on."""


@contextlib.contextmanager
def submission_lock(directory: Path) -> Iterator[None]:
    """One submitter at a time per run directory, on every machine whose file system passes locks on."""
    with open(directory / ".submit.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none. A JSONDecodeError, a ValueError, names the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{path}: damaged: {error.msg}", error.doc, error.pos) from None


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as a whole or not at all."""
    # Two machines, or two containers, may have one process number; `pipeline.run_directory` names its files likewise.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_from(path: Path, offset: int) -> tuple[str, int]:
    """Text of a file from a byte offset, and the offset after it; nothing where there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return "", offset
    return content.decode(errors="replace"), offset + len(content)


def person() -> str:
    """Who asks; a user that only a number knows has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
