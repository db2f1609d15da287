"""Child processes that run tasks over hostile files, and what becomes of a file that ends its process.

A decoder may crash (SIGSEGV), never return, or take the memory of the machine, and nothing within its process can stop
it. So tasks run in children. A task says which file it holds, by its number, in a few bytes of memory that it shares
with its parent (`held`). Where a child crashes, does not come back from one file, or grows beyond a bound, that file is
to blame: the task runs again from its beginning in a new child, and there `held` raises ImageFault for this file
instead of opening it.
A child that ends for no fault of a file (killed from outside) gets its task a second chance. A file whose bytes do not
come is not to blame, its disk or server is, and all its files would have to go: that ends everything.

Children are programs of their own, not forks: the caller may run threads, and a child must not import the caller's main
module. They die with it, and leave Ctrl-C to it.
"""

import mmap
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import NamedTuple, TypeVar

import psutil

from pipeline.parenthood import ignore_stops, serve_parent, stops_held
from pipeline.shards.decoding import ImageFault, memory_fault

POLL_SECONDS = 0.1
DYING_SECONDS = 5.0
OUTSIDE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
NO_FILE = -1

Task = TypeVar("Task")
Result = TypeVar("Result")


class Limits(NamedTuple):
    """What one file may take: seconds of decoding, bytes of memory that its process grows by meanwhile, and seconds of
    being read."""

    seconds: float
    memory_bytes: int
    reading_seconds: float = 600.0


def memory_limit(max_pixels: int) -> int:
    """Bytes that a child gets by with for images of so many pixels: 24 each, of which Pillow holds 4, twice while it
    converts, and the decoder of a progressive JPEG 6; at least 1 GiB."""
    return max(1 << 30, 24 * max_pixels)


class WorkerLost(Exception):
    """The children of one task ended twice, and no file is to blame. The message is one line."""


class TooManyFaults(Exception):
    """More files than allowed ended their process. The message is one line."""


class ReadingHangs(Exception):  # noqa: N818
    """The bytes of a file did not come. The message is one line, which names it."""


class _Board:
    """What a child shows its parent while it cannot speak: the file that it holds, whether its decoder is at work, and
    a step that changes with either."""

    LAYOUT = struct.Struct("qqq")

    def __init__(self, descriptor: int):
        self._memory = mmap.mmap(descriptor, self.LAYOUT.size)
        self._step = 0
        self.show(NO_FILE)

    def show(self, file: int, *, decoding: bool = False) -> None:
        self._step += 1
        self.LAYOUT.pack_into(self._memory, 0, self._step, file, decoding)

    def seen(self) -> tuple[int, int, bool]:
        """(step, file, decoding)"""
        step, file, decoding = self.LAYOUT.unpack_from(self._memory)
        return step, file, bool(decoding)


class _Child:
    """What `held` knows in a child; in any other process there is none."""

    board: _Board | None = None
    faults: Mapping[int, ImageFault] = {}


class held:  # noqa: N801
    """Within, whatever ends this process is laid to the file of this number; MemoryError becomes ImageFault.

    Its time starts with the call of what is yielded: reading a file may be slow for no fault of its own. Raises
    ImageFault where the file has ended a process before. A class, as a generator takes a microsecond of each file.
    """

    __slots__ = ("_board", "_file")

    def __init__(self, file: int):
        self._file, self._board = file, _Child.board

    def __enter__(self) -> Callable[[], None]:
        if (fault := _Child.faults.get(self._file)) is not None:
            raise fault
        if self._board is not None:
            self._board.show(self._file)
        return self._start_clock

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._board is not None:
            self._board.show(NO_FILE)
        if kind is not None and issubclass(kind, MemoryError):
            raise memory_fault() from None

    def _start_clock(self) -> None:
        if self._board is not None:
            self._board.show(self._file, decoding=True)


def in_isolation(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, limits: Limits, allowed_faults: int
) -> Iterator[Result]:
    """The results as they are ready, in any order. Tasks, results and the function are pickled; a task has
    `where(file)`, as a shard job has.

    A task that raises ends the iteration with its exception. WorkerLost, TooManyFaults, ReadingHangs: see there.
    Whenever the iteration ends, also by `close`, the children are killed, whatever they are doing.
    """
    waiting = deque(range(len(tasks)))
    faults: dict[int, dict[int, ImageFault]] = {}
    lost: Counter[int] = Counter()
    children: list[_Worker] = []
    try:
        while waiting or children:
            while waiting and len(children) < workers:
                children.append(_Worker(limits))
                children[-1].give(function, tasks, waiting.popleft(), faults)
            ready = wait([child.connection for child in children], timeout=POLL_SECONDS)
            for child in list(children):
                answer = child.answer() if child.connection in ready else child.watch()
                if isinstance(answer, _Reading):
                    raise ReadingHangs(
                        f"{tasks[child.task].where(answer.file)}: not read within {limits.reading_seconds:g} seconds "
                        "(max_read_seconds): its disk or server does not answer"
                    )
                if isinstance(answer, _Done):
                    if waiting:
                        child.give(function, tasks, waiting.popleft(), faults)
                    else:
                        children.remove(child.end())
                    yield answer.result()
                elif isinstance(answer, _Ended):
                    children.remove(child.end())
                    waiting.appendleft(child.task)
                    _blame(answer, child.task, faults, lost, allowed_faults)
    finally:
        for child in children:
            child.end()


class _Done(NamedTuple):
    """A child has finished its task."""

    value: object
    raised: BaseException | None

    def result(self) -> object:
        if self.raised is not None:
            raise self.raised
        return self.value


class _Ended(NamedTuple):
    """A child is no more; `file` is to blame with `fault`, if any is."""

    file: int
    fault: ImageFault | None
    how: str


class _Reading(NamedTuple):
    """A child has waited too long for the bytes of a file."""

    file: int


def _blame(
    ended: _Ended, task: int, faults: dict[int, dict[int, ImageFault]], lost: Counter[int], allowed_faults: int
) -> None:
    if ended.fault is None:
        lost[task] += 1
        if lost[task] > 1:
            raise WorkerLost(f"a worker process {ended.how}, twice at the same shard")
        return
    faults.setdefault(task, {})[ended.file] = ended.fault
    reasons = Counter(fault.reason for of_task in faults.values() for fault in of_task.values())
    if reasons.total() > allowed_faults:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        raise TooManyFaults(f"{counts}; the last: {ended.fault.detail}")


class _Worker:
    """A child and its task, seen from the parent."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self.connection, theirs = Pipe()
        with tempfile.TemporaryFile() as file:
            file.truncate(_Board.LAYOUT.size)
            self._board = _Board(file.fileno())
            descriptors = (theirs.fileno(), file.fileno())
            arguments = (*descriptors, os.getpid(), limits.memory_bytes)
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve{arguments!r}"
            # One thread each: the numbers here are small, and every core has a child of its own.
            environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
            with stops_held():  # until `serve` ignores them
                self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=descriptors, env=environment)
        theirs.close()
        self._memory = psutil.Process(self._process.pid)
        self.task = -1
        self._looked, self._seen = time.monotonic(), self._board.seen()
        self._seconds, self._resident_before = 0.0, 0

    def give(
        self, function: Callable, tasks: Sequence, task: int, faults: Mapping[int, Mapping[int, ImageFault]]
    ) -> None:
        self.task = task
        try:
            self.connection.send_bytes(pickle.dumps((function, tasks[task], faults.get(task, {}))))
        except ConnectionError:
            pass  # it has ended; `answer` will say so

    def answer(self) -> _Done | _Ended:
        """What the child has sent, or how it ended."""
        try:
            return _Done(*pickle.loads(self.connection.recv_bytes()))
        except (EOFError, ConnectionError):
            return self._how_it_ended()

    def watch(self) -> _Ended | _Reading | None:
        """Kill the child if its decoder takes too long, or grows too much; None where all is well.

        Seconds are those in which this process was there to look: a suspended machine counts for nobody. Memory that
        the child held before is its source's, which may keep a part of a large file.
        """
        seen, now, resident = self._board.seen(), time.monotonic(), self._resident_bytes()
        passed, self._looked = min(now - self._looked, 10 * POLL_SECONDS), now
        if seen != self._seen:
            self._seen, self._seconds, self._resident_before = seen, 0.0, resident
            return None
        self._seconds += passed
        _, file, decoding = seen
        if file != NO_FILE and not decoding and self._seconds > self._limits.reading_seconds:
            return _Reading(file)
        if decoding and self._seconds > self._limits.seconds:
            detail = f"not decoded within {self._limits.seconds:g} seconds (max_image_seconds)"
            return self._killed(ImageFault("too_slow", detail))
        if decoding and resident - self._resident_before > self._limits.memory_bytes:
            return self._killed(memory_fault())
        return None

    def end(self) -> "_Worker":
        self._kill()
        self.connection.close()
        return self

    def _kill(self) -> None:
        """And wait for its end, unless the system cannot end it: it reads from a mount that is dead."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DYING_SECONDS)

    def _resident_bytes(self) -> int:
        try:
            return self._memory.memory_info().rss
        except psutil.Error:  # it has ended; its connection will say so
            return 0

    def _killed(self, fault: ImageFault) -> _Ended:
        self._kill()
        if self._board.seen() != self._seen:  # it came through in the last moment
            return _Ended(NO_FILE, None, "was slow")
        return _Ended(self._seen[1], fault, "was killed")

    def _how_it_ended(self) -> _Ended:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        _, file, _ = self._board.seen()
        if file == NO_FILE or -code in OUTSIDE_SIGNALS:
            return _Ended(NO_FILE, None, how)
        return _Ended(file, ImageFault("decoder_crashed", f"the process that decoded it {how}"), how)


def serve(connection: int, board: int, parent: int, memory_bytes: int) -> None:
    """The life of a child: run what it is given until its parent hangs up."""
    serve_parent(parent) if sys.platform == "linux" else ignore_stops()
    _limit_resources(memory_bytes)
    _Child.board = _Board(board)
    with Connection(connection) as parent_connection:
        while True:
            try:
                function, task, _Child.faults = pickle.loads(parent_connection.recv_bytes())
            except EOFError:
                return
            parent_connection.send_bytes(_outcome(function, task))


def _limit_resources(memory_bytes: int) -> None:
    """No core files; and a bound on what is asked for at once, which is quicker than the parent's look."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    data = getattr(psutil.Process().memory_info(), "data", 0)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    bound = data + 2 * memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (bound if most == resource.RLIM_INFINITY else min(bound, most), most))


def _outcome(function: Callable[[Task], Result], task: Task) -> bytes:
    try:
        return pickle.dumps((function(task), None))
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        try:
            content = pickle.dumps((None, error))
            pickle.loads(content)
            return content
        except Exception:  # an exception that does not come through a pickle
            return pickle.dumps((None, RuntimeError("".join(traceback.format_exception(error)))))
