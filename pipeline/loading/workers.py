"""Forked worker processes that take tickets from one pipe, and answer through one pipe each.

A ticket is a number, eight bytes; an idle worker takes the next. So a slow one delays nobody else, and one that dies
holds no lock. Workers leave stop requests to their rank and die with it, however it dies.
"""

import multiprocessing
import os
import pickle
import struct
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from pipeline.errors import FaultError
from pipeline.parenthood import serve_parent

_TICKET = struct.Struct("<q")


class _Answer(NamedTuple):
    """Of one ticket: what came of it, or what it raised."""

    ticket: int
    result: Any
    error: Exception | None = None


class Workers:
    """`count` processes that call `work(ticket)`; its results are pickled back. To be made on the main thread."""

    def __init__(self, work: Callable[[int], Any], count: int):
        self.work, self.count, self._closed = work, count, False
        self._answers: dict[int, _Answer] = {}
        self._tickets, self._hand_out = os.pipe()
        context = multiprocessing.get_context("fork")
        self._processes: dict[Connection, Any] = {}
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=self._live, args=(theirs, os.getpid()), name=f"loader-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes[ours] = process

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes.values()]

    def hand_out(self, tickets: range) -> None:
        os.write(self._hand_out, b"".join(map(_TICKET.pack, tickets)))

    def collect(self, tickets: range) -> list[Any]:
        """What came of these tickets; waits for them.

        Raises what one of them raised, and nothing that a ticket of later batches raised; FaultError where a worker
        was killed.
        """
        while not all(ticket in self._answers for ticket in tickets):
            for connection in wait([*self._processes]):
                self._receive(connection)
        answers = [self._answers.pop(ticket) for ticket in tickets]
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [answer.result for answer in answers]

    def _receive(self, connection: Connection) -> None:
        try:
            answer = connection.recv()
        except EOFError:
            process = self._processes.pop(connection)
            process.join()
            raise FaultError(
                f"{process.name} (pid {process.pid}) {_how_ended(process.exitcode)}; if memory ran out, lower "
                "profile.loader_workers"
            ) from None
        self._answers[answer.ticket] = answer

    def close(self) -> None:
        """End the processes at once."""
        if self._closed:
            return
        self._closed = True
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()
        self._processes.clear()
        for descriptor in (self._tickets, self._hand_out):
            os.close(descriptor)

    def _live(self, answers: Connection, parent: int) -> None:
        """A worker, from the fork to its end."""
        serve_parent(parent)
        os.close(self._hand_out)
        for connection in self._processes:
            connection.close()
        torch.set_num_threads(1)
        while ticket := os.read(self._tickets, _TICKET.size):
            answers.send(self._answer(*_TICKET.unpack(ticket)))

    def _answer(self, ticket: int) -> _Answer:
        try:
            return _Answer(ticket, self.work(ticket))
        except Exception as error:
            return _Answer(ticket, None, _portable(error))


def _portable(error: Exception) -> Exception:
    """The exception, where it is one of ours and survives pickling; else its traceback as text."""
    try:
        pickle.loads(pickle.dumps(error))
        if type(error).__module__.startswith("pipeline."):
            return error
    except Exception:
        pass
    return RuntimeError("in a loader worker:\n" + "".join(traceback.format_exception(error)).rstrip())


def _how_ended(exit_code: int | None) -> str:
    return f"was killed by signal {-exit_code}" if exit_code and exit_code < 0 else f"ended with code {exit_code}"
