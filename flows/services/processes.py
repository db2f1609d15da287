"""The processes of one local stack: started with a mark, found by it, ended to the last one.

Each part carries VIT_STACK (the home) and VIT_PART (its name) in its environment, and everything that it starts
inherits both: flow runs, their jobs, and what detached itself into its own session. So nothing is signalled because of
a number or a name alone, and a training run that a person started by hand in the same home is never touched.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from pipeline.errors import FaultError

MARK = "VIT_STACK"
PART = "VIT_PART"
GRACE_SECONDS = 10.0
JOB_GRACE_SECONDS = 60.0  # a training job writes its checkpoint before it stops


def start_part(
    name: str, module: str, arguments: list[str], home: Path, environment: dict[str, str]
) -> subprocess.Popen:
    """Start `python -m module arguments` in its own session, its output in `log_path(home, name)`."""
    log = log_path(home, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        os.replace(log, log.with_suffix(".log.1"))
    with log.open("wb") as sink:
        return subprocess.Popen(
            # -P: the home has folders named like packages (`prefect/`), which must not be imported.
            [sys.executable, "-P", "-m", module, *arguments],
            cwd=home,
            env=environment | {MARK: str(home), PART: name, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_default_interrupt,
        )


def log_path(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"


def last_lines(log: Path, count: int = 3) -> str:
    """The last lines that say something, joined to one: what a person needs to see of a failed part."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return " | ".join([line.strip() for line in lines if line.strip()][-count:])


def stack_processes(home: Path) -> dict[psutil.Process, str]:
    """Every living process of the stack in `home`, with the part that it belongs to; never the asking one."""
    asking = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found: dict[psutil.Process, str] = {}
    parts: dict[int, str] = {}
    # By age, so that a parent comes before its children: a child without the mark belongs to its parent's part.
    for process in sorted(psutil.process_iter(["create_time"]), key=lambda each: each.info["create_time"] or 0.0):
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid in asking:
                continue
            part = _marked_part(process, home) or parts.get(process.ppid())
        except psutil.Error:
            continue
        if part is not None:
            found[process] = parts[process.pid] = part
    return found


def end_processes(find: Callable[[], Iterable[psutil.Process]]) -> int:
    """End what `find` finds until it finds nothing, and say how many processes that were.

    Each is asked once with SIGTERM, and killed after its grace. What runs below a job is left to the job, which stops
    its ranks in order. Raises FaultError for processes that survive SIGKILL (stuck in the kernel).
    """
    begin: dict[psutil.Process, float] = {}
    while found := set(find()):
        now = time.monotonic()
        jobs = jobs_and_below(found)
        for process in found:
            grace = JOB_GRACE_SECONDS if process in jobs else GRACE_SECONDS
            if process not in begin:
                begin[process] = now
                if not jobs.get(process):
                    _send(process, signal.SIGTERM)
            elif now - begin[process] > grace + GRACE_SECONDS:
                raise FaultError(f"process {process.pid} does not end, not even by SIGKILL: {_command(process)}")
            elif now - begin[process] > grace:
                _send(process, signal.SIGKILL)
        time.sleep(0.1)
    return len(begin)


def is_job(process: psutil.Process) -> bool:
    """Whether this is the process of a stage (`python -m pipeline...`) and not one of the orchestration."""
    return any(argument.startswith("pipeline.") for argument in _command(process))


def jobs_and_below(processes: set[psutil.Process]) -> dict[psutil.Process, bool]:
    """The jobs among `processes` and what runs below them; True where a job above is there to stop it."""
    pids = {process.pid: process for process in processes}
    jobs: dict[psutil.Process, bool] = {}
    for process in sorted(processes, key=lambda each: each.create_time()):
        below = _parent(process) in pids and pids[_parent(process)] in jobs
        if below or is_job(process):
            jobs[process] = below
    return jobs


def _marked_part(process: psutil.Process, home: Path) -> str | None:
    environment = process.environ()
    return environment.get(PART, "") if environment.get(MARK) == str(home) else None


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _send(process: psutil.Process, signal_number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal_number)


def _default_interrupt() -> None:
    # A shell starts background commands with SIGINT ignored, children inherit it, and Prefect stops on SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
