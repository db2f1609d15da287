"""Runs a function over shards in worker processes that never outlive this one."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from typing import TypeVar

POOL_FROM_BYTES = 32 << 20  # below, starting processes takes longer than decoding
WAITING_TASKS = 2  # per worker: the one it works on, and the next

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """The results as they are ready, in any order; with one worker, in this process and in the order of the tasks.

    Tasks are taken as workers get to them, so that a generator may make them one by one. Tasks, results and the
    function are pickled. A task that raises ends the iteration with its exception, a worker that is killed with
    `BrokenProcessPool`; tasks under way are waited for.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the caller may run threads (Prefect does), and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    tasks = iter(tasks)
    try:
        under_way: set[Future[Result]] = set()
        while True:
            new = islice(tasks, WAITING_TASKS * workers - len(under_way))
            under_way |= {executor.submit(function, task) for task in new}
            if not under_way:
                return
            ready, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ready)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent, and die with it even when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
