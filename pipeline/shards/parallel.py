"""Runs a function over shards in worker processes that never outlive this one."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

POOL_FROM_BYTES = 32 << 20  # below, starting processes takes longer than decoding

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """The results as they are ready, in any order; with one worker, in this process and in the order of the tasks.

    Tasks, results and the function are pickled. A task that raises ends the iteration with its exception, a worker that
    is killed with `BrokenProcessPool`; tasks under way are waited for.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the caller may run threads (Prefect does), and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_end_with_parent)
    try:
        for future in as_completed([executor.submit(function, task) for task in tasks]):
            yield future.result()
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
