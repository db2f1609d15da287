"""What every rank does around its stage: signals become a flag, exceptions become an exit code and a record.

Stops are held from the first line on and heard from before torch is imported: none is lost.
"""

import contextlib
import faulthandler
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pipeline.errors import (
    DISK_FULL,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_FAULT,
    EXIT_INPUT,
    EXIT_STOPPED,
    DataError,
    FaultError,
    HealthError,
    InputError,
    RefusedError,
)
from pipeline.parenthood import STOP_SIGNALS
from pipeline.progress import Position, Progress, progress_file
from pipeline.redaction import without_secrets
from pipeline.run_directory import Attempt, RunDirectory, read_json
from pipeline.supervision.judgement import BROKEN_COLLECTIVE, BROKEN_DEVICE, ExitRecord
from pipeline.supervision.liveness import beat_for_all, begin_by_hand, lives
from pipeline.supervision.watchdog import DUMP_SIGNAL

MEETING_SECONDS = 60.0
_STOPS = (signal.SIGTERM, signal.SIGUSR1)

# What a broken collective says (gloo, NCCL, the store): the peer's fault, not this rank's.
_BROKEN_COLLECTIVE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
    "Connection refused", "NCCL", "gloo", "Gloo", "DistNetworkError", "DistStoreError", "connectFullMesh",
)  # fmt: skip
# What a device says that is broken or not to be had: this machine's fault, and another may do.
_BROKEN_DEVICE = (
    "uncorrectable ECC", "CUDA error: unknown error", "unspecified launch failure", "hardware stack error",
    "CUDA-capable device(s) is/are busy or unavailable", "no CUDA-capable device", "GPU has fallen off the bus",
    "NVLink",
)  # fmt: skip


@dataclass
class Rank:
    """This process's place in the job, and what it is doing."""

    run: RunDirectory
    attempt: Attempt
    rank: int
    local_rank: int
    world_size: int
    stop_requested: bool = False
    progress: Progress = field(default_factory=Progress)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def phase(self) -> str:
        """What it is doing; see `progress.PHASES`."""
        return self.progress.phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self.progress.enter(phase)

    @property
    def step(self) -> int:
        """The step it makes, from 0; -1 before the first."""
        return self.progress.step

    @step.setter
    def step(self, step: int) -> None:
        self.progress.step = step


class Stopped(Exception):
    """The stage stopped on request, its checkpoint complete."""


def run_rank(run_directory: str, stage: str, *, stops_at_steps: bool = True) -> None:
    """Run `stage` ("module:function", called with a Rank) and end this process with the code of the contract.

    A stage that `stops_at_steps` finds `stop_requested` set and saves first; any other is interrupted where it is.
    While it is being imported it has met no peer and has nothing to save: this process then ends at once.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        me = _this_rank(RunDirectory(run_directory).require())
    except (InputError, FaultError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_INPUT if isinstance(error, InputError) else EXIT_FAULT)
    attempt = me.attempt  # the supervisor's; a sequence goes on to those of its runs
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL, open(attempt.stacks(me.rank), "a"), all_threads=True)
    _hear_stops(me, attempt, stops_at_steps)
    _leave(me, attempt, *_run(me, stage, interruptible=not stops_at_steps))


def _this_rank(run: RunDirectory) -> Rank:
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    attempt = _attempt(run, rank, world_size)
    return Rank(run, attempt, rank, local_rank, world_size, progress=Progress(_progress_file(attempt, rank)))


def _progress_file(attempt: Attempt, rank: int) -> Path:
    """Where the supervisor follows this rank: on the node's own disk where there are several nodes."""
    folder = os.environ.get("VIT_PROGRESS")
    return progress_file(Path(folder), rank) if folder else attempt.progress(rank)


def _leave(me: Rank, attempt: Attempt, code: int, reason: str) -> NoReturn:
    reason = without_secrets(reason)
    try:
        attempt.write_exit(ExitRecord(me.rank, code, reason, me.phase, me.step))
    except OSError as error:
        sys.stderr.write(f"{reason}; and the exit record could not be written: {error}\n")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # a process group with a dead peer can hang in its destructors


def _attempt(run: RunDirectory, rank: int, world_size: int) -> Attempt:
    """The attempt the supervisor numbered; under another launcher rank 0 takes the next and the others wait for it."""
    if given := os.environ.get("VIT_ATTEMPT"):
        return run.attempt(int(given))
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}:{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    if rank == 0:
        attempt = begin_by_hand(run, meeting)
        beat_for_all(attempt, world_size)
        return attempt
    deadline = time.monotonic() + MEETING_SECONDS
    while not _names_attempt(job := read_json(run.job_file) or {}, meeting):
        if time.monotonic() > deadline:
            raise FaultError(f"{run.job_file}: rank 0 did not name an attempt within {MEETING_SECONDS:.0f} s")
        time.sleep(0.1)
    return run.attempt(job["attempt"]).make()


def _names_attempt(job: dict, meeting: str) -> bool:
    """Whether rank 0 of this meeting wrote it: an earlier one may have had the same address."""
    return job.get("meeting") == meeting and (job["host"] != socket.gethostname() or lives(job))


def _hear_stops(me: Rank, attempt: Attempt, stops_at_steps: bool) -> None:
    """Turn requests to stop into a flag, in a thread: they stay blocked in all others, and in all that they start.

    A cluster signals whole process trees, and a compiler that died of it would be taken for a failure of the stage.
    A stage that does not stop at steps is interrupted, by handlers, once `_run` unblocks them.
    """

    def request_stop(number: int, frame: object) -> None:
        if me.stop_requested:
            return
        me.stop_requested = True
        if me.phase == "start":  # an exception out of an import may end anywhere
            where = "the first step" if stops_at_steps else "anything was done"
            _leave(me, attempt, EXIT_STOPPED, f"stopped on request before {where}")
        if not stops_at_steps:
            raise Stopped(f"stopped on request during {me.phase}")

    def wait_for_stops() -> None:
        while True:
            request_stop(signal.sigwait(_STOPS), None)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to translate
    if stops_at_steps:
        threading.Thread(target=wait_for_stops, daemon=True).start()
    else:
        for number in _STOPS:
            signal.signal(number, request_stop)


def _run(me: Rank, stage: str, *, interruptible: bool = False) -> tuple[int, str]:
    module, _, function = stage.partition(":")
    try:
        if interruptible:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        getattr(importlib.import_module(module), function)(me)
    except Stopped as stopped:
        return EXIT_STOPPED, str(stopped)
    except InputError as error:
        return EXIT_INPUT, "; ".join(error.problems)
    except FaultError as error:
        return EXIT_FAULT, str(error)
    except DataError as error:
        return EXIT_FAILED, f"DataError: {error}"
    except (HealthError, RefusedError) as error:
        return EXIT_FAILED, str(error)
    except BaseException as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(without_secrets(traceback.format_exc()))
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            what, where = error.filename or f"what belongs to {me.run.path}", Position(0, me.step, me.phase).in_words
            return EXIT_FAULT, f"{what} could not be written {where}: {error.strerror}"
        words = f"{type(error).__name__}: {error}"
        first_line = words.splitlines()[0]
        if isinstance(error, RuntimeError):
            for what, marks in ((BROKEN_DEVICE, _BROKEN_DEVICE), (BROKEN_COLLECTIVE, _BROKEN_COLLECTIVE)):
                if any(mark in words for mark in marks):
                    return EXIT_FAULT, f"{what}: {first_line}"
        return EXIT_FAILED, first_line
    return EXIT_DONE, "done"
