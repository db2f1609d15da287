"""A flow's own state, asked for by itself: so that a cancellation arrives whatever became of the worker or the API.

Prefect's own way (the runner sends SIGTERM) is dead for good half a minute into an outage, and a SIGTERM alone says
nothing: it also comes of a worker that stops. Only the state says that somebody wants the run to end.
"""

import contextlib
import contextvars
import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run as current_flow_run
from prefect.states import Running

from flows.orchestration.watchers import WatcherNote
from flows.services.api import impatient_client

POLL_SECONDS = 3.0
ANSWER_SECONDS = 8.0  # a SIGTERM waits so long for the API to say whether it is a cancellation
WANTED = (StateType.CANCELLING, StateType.CANCELLED)
_WATCH: ContextVar["OwnState"] = ContextVar("own_state")


class OwnState:
    """Polls the state of the flow run of this process in a thread; sets `cancelled` when it says so."""

    def __init__(self, note: WatcherNote, cancelled: threading.Event):
        self.flow_run_id, self.note, self.cancelled = note.id, note, cancelled
        self.untold: list[Callable[[], Any]] = []  # reports that the API did not take, tried again at the end
        self._ended, self._wake, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._asked_to_end_at: float | None = None
        self._passes_on = False
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._poll,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout=20)

    def wait_for_api(self) -> None:
        """Return once the API has answered from now on: a state that cannot be told is told by nobody."""
        self._answered.clear()
        self._wake.set()
        self._answered.wait()

    def terminated(self, number: int, previous: Any) -> None:
        """SIGTERM: a cancellation leaves the job to be stopped in order; of anything else the flow dies, the job not.

        The thread finds out, and sends the signal again where it is no cancellation.
        """
        if self._passes_on or self._ended.is_set():
            if callable(previous):
                previous(number, None)
            else:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif not self.cancelled.is_set():
            self._asked_to_end_at = time.monotonic()
            self._wake.set()

    def _poll(self) -> None:
        while not self._ended.is_set():
            try:
                self._poll_with_one_client()
            except Exception:  # whatever the API, its client or the network raise: asked again
                self._settle_termination(None)
            self._sleep(1.0 if self._asked_to_end_at else POLL_SECONDS)

    def _poll_with_one_client(self) -> None:
        with impatient_client() as client:
            while not self._ended.is_set():
                with contextlib.suppress(OSError):
                    self.note.beat()
                kind = self._kind(client)
                if kind in WANTED:
                    self.cancelled.set()
                elif kind == StateType.CRASHED and not self._ended.is_set():
                    # An automation took the silence of an outage for the end of this process.
                    client.set_flow_run_state(
                        self.flow_run_id, Running(message="its process was silent, and lives"), force=True
                    )
                self._settle_termination(kind)
                self._answered.set()
                self._sleep(POLL_SECONDS)

    def _kind(self, client: SyncPrefectClient) -> StateType | None:
        try:
            state = client.read_flow_run(self.flow_run_id).state
        except (ObjectNotFound, PrefectHTTPStatusError):  # deleted, or refused: an answer, and no cancellation
            return None
        return state.type if state is not None else None

    def _settle_termination(self, kind: StateType | None) -> None:
        """`kind` is None where the API did not answer."""
        if self._asked_to_end_at is None or self._ended.is_set():
            return
        if self.cancelled.is_set():
            self._asked_to_end_at = None
        elif kind is not None or time.monotonic() - self._asked_to_end_at > ANSWER_SECONDS:
            self._passes_on = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _sleep(self, seconds: float) -> None:
        self._wake.wait(seconds)
        self._wake.clear()


@contextlib.contextmanager
def own_state(
    home: Path, *, single: bool, cancelled: threading.Event | None = None, on_sigterm: Any = None
) -> Iterator[OwnState]:  # fmt: skip
    """Watch the state of this flow run for the length of the block, and note who does; `this_watch` finds it.

    The note stays behind where the block ends by an exception: the flow has not said how its runs ended.

    Args:
        cancelled: set when the flow run is cancelled; by default one of its own.
        on_sigterm: the handler of a command that knows what SIGTERM means to it.
    """
    note = WatcherNote(home, str(current_flow_run.id))
    note.begin(single=single)
    watch = OwnState(note, cancelled or threading.Event())
    token = _WATCH.set(watch)
    watch.start()
    _outlive_reader()
    try:
        with _sigterm(watch, on_sigterm):
            yield watch
    finally:
        watch.end()
        _WATCH.reset(token)


def this_watch() -> OwnState:
    """The watch of the flow that this code runs in."""
    return _WATCH.get()


@contextlib.contextmanager
def _sigterm(watch: OwnState, handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # a flow within a thread takes no signals
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler or (lambda number, frame: watch.terminated(number, previous)))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _outlive_reader() -> None:
    """Once nobody reads what this process prints, it prints to nowhere.

    A flow's output is a pipe that its worker reads. When the worker dies, Prefect's console log would end the flow with
    the next line that it writes (measured: rich makes SystemExit of a broken pipe).
    """
    pipes = [number for number in (1, 2) if stat.S_ISFIFO(os.fstat(number).st_mode)]

    def wait() -> None:
        poller = select.poll()
        for number in pipes:
            poller.register(number, 0)  # errors alone, which for a pipe is that its reader is gone
        for _ in pipes:
            for number, _ in poller.poll():
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
                poller.unregister(number)

    if pipes:
        threading.Thread(target=wait, daemon=True).start()
