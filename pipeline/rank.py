"""What every rank does around its stage: signals become a flag, exceptions become an exit code and a record.

The handlers are installed before torch is imported, so that a stop that arrives during start-up is not lost.
"""

import faulthandler
import importlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass

from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_FAULT, EXIT_INPUT, EXIT_STOPPED, FaultError, InputError
from pipeline.run_directory import Attempt, ExitRecord, RunDirectory

# What a broken collective says (gloo, NCCL, the store): the peer's fault, not this rank's.
_BROKEN_COLLECTIVE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
    "Connection refused", "NCCL", "gloo", "Gloo", "DistNetworkError", "DistStoreError", "connectFullMesh",
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
    phase: str = "start"
    step: int = -1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


class Stopped(Exception):
    """The stage stopped on request, its checkpoint complete."""


def run_rank(run_directory: str, stage: str) -> None:
    """Run `stage` ("module:function", called with a Rank) and end this process with the code of the contract."""
    run = RunDirectory(run_directory)
    attempt = run.attempt(int(os.environ["VIT_ATTEMPT"]))
    me = Rank(run, attempt, *(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    faulthandler.enable()
    _install_handlers(me)
    code, reason = _run(me, stage)
    attempt.write_exit(ExitRecord(me.rank, code, reason, me.phase, me.step))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a process group with a dead peer can hang in its destructors


def _install_handlers(me: Rank) -> None:
    def request_stop(number: int, frame: object) -> None:
        me.stop_requested = True

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, request_stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to translate


def _run(me: Rank, stage: str) -> tuple[int, str]:
    module, _, function = stage.partition(":")
    try:
        getattr(importlib.import_module(module), function)(me)
    except Stopped as stopped:
        return EXIT_STOPPED, str(stopped)
    except InputError as error:
        return EXIT_INPUT, "; ".join(error.problems)
    except FaultError as error:
        return EXIT_FAULT, str(error)
    except BaseException as error:
        traceback.print_exc()
        words = f"{type(error).__name__}: {error}"
        broken = isinstance(error, RuntimeError) and any(mark in words for mark in _BROKEN_COLLECTIVE)
        first_line = words.splitlines()[0]
        return (EXIT_FAULT, f"a collective broke: {first_line}") if broken else (EXIT_FAILED, first_line)
    return EXIT_DONE, "done"
