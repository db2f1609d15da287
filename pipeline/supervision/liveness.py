"""Who works on an attempt: a process that job.json names, and a heartbeat while it does. Torch-free.

job.json names a process by pid and start time, as the launcher of this machine does that finds and stops jobs.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping

import psutil

from pipeline.errors import InputError
from pipeline.run_directory import Attempt, RunDirectory, read_json, write_atomic, write_json

BEAT_SECONDS = 10.0
FRESH_SECONDS = 30.0  # a heartbeat that is older is no sign of life
KINDS_OF_MACHINE = ("local", "by hand")  # of jobs that nobody but their own machine knows


def begin_by_hand(run: RunDirectory, meeting: str = "") -> Attempt:
    """The next attempt, of this process, which no controller started; `meeting` is known to its peers as well.

    InputError where another process of this machine works on the run.
    """
    job, ours = read_json(run.job_file) or {}, f"{os.getpid()}:{psutil.Process().create_time():.2f}"
    if job.get("id") != ours and lives(job):
        raise InputError(
            f"{run.path}: attempt {job['attempt']} runs as process {job['id'].partition(':')[0]}; "
            f"stop it by `vit stop {run.path}`"
        )
    number = run.last_attempt() + 1
    whose = {"kind": "by hand", "id": ours, "key": run.key, "attempt": number}
    write_json(run.job_file, whose | {"host": socket.gethostname(), "meeting": meeting})
    return run.attempt(number).make()


def lives(job: Mapping) -> bool:
    """Whether the process that a job.json names runs on this machine."""
    pid, _, started = str(job.get("id", "")).partition(":")
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(started)) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
    return False


def beat(
    attempt: Attempt, started: float, pids: Mapping[int, int | None], *, node: int = 0,
    positions: Mapping[int, Mapping] | None = None,
) -> None:  # fmt: skip
    """Say that the ranks of `pids`, null for one that is not known, work on `attempt` since `started`, and where."""
    said = {"time": time.time(), "started": started, "host": host_name(), "pid": os.getpid(), "ranks": pids}
    with contextlib.suppress(OSError):  # a full disk ends what needs it, and says so there
        write_atomic(attempt.heartbeat(node), json.dumps(said | {"node": node, "positions": positions or {}}))


def host_name() -> str:
    """This machine's name, as its cluster knows it."""
    return os.environ.get("SLURMD_NODENAME") or os.environ.get("VIT_NODE_NAME") or socket.gethostname()


def beat_for_all(attempt: Attempt, world_size: int) -> None:
    """Rank 0 beats for all ranks, now and from a thread, where no supervisor of ours does."""
    started, pids = time.time(), dict.fromkeys(range(world_size)) | {0: os.getpid()}

    def go_on() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            beat(attempt, started, pids)

    beat(attempt, started, pids)
    threading.Thread(target=go_on, daemon=True).start()


def running_elsewhere(run: RunDirectory) -> str | None:
    """In words, where the newest attempt runs, when it is on another machine, and no cluster that can be asked."""
    attempt = run.attempt(run.last_attempt())
    if (read_json(run.job_file) or {}).get("kind", "local") not in KINDS_OF_MACHINE or attempt.verdict():
        return None
    for path in sorted(attempt.path.glob("heartbeat/node-*")):
        said = read_json(path) or {}
        age = time.time() - said.get("time", 0)
        if said.get("host", host_name()) != host_name() and age <= FRESH_SECONDS:
            return f"attempt {attempt.number} runs on {said['host']} as process {said['pid']}, heard of {age:.0f} s ago"
    return None
