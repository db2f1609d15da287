"""Jobs on this machine: a process group of its own per job, found again by pid and start time."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.job import (
    JOB_FILE,
    STOP_FILE,
    Job,
    JobRequest,
    JobState,
    read_from,
    read_object,
    submission_lock,
    write_object,
)


class LocalLauncher:
    """Starts each job in its own session, so that it outlives the terminal and takes no Ctrl-C by accident."""

    kind = "local"

    def submit(self, request: JobRequest) -> Job:
        with submission_lock(request.directory):
            existing = self.find(request.directory)
            if existing is not None and self.state(existing) is JobState.RUNNING:
                return existing
            (request.directory / STOP_FILE).unlink(missing_ok=True)
            request.log.parent.mkdir(parents=True, exist_ok=True)
            with open(request.log, "ab") as log:
                # The job file stands before the job: what it starts may already read its attempt there.
                self._record(request, "starting")
                with _stops_held():
                    process = subprocess.Popen(
                        request.command,
                        env=os.environ | request.environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
            return self._record(request, _identity(psutil.Process(process.pid)))

    def render(self, request: JobRequest) -> dict[str, str]:
        lines = ["#!/bin/bash"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(request.environment.items())]
        lines.append(f"exec {shlex.join(request.command)} >>{shlex.quote(str(request.log))} 2>&1")
        return {"job.sh": "\n".join(lines) + "\n"}

    def objections(self, request: JobRequest) -> tuple[list[str], list[str]]:
        return [], []

    def find(self, directory: Path) -> Job | None:
        raw = read_object(directory / JOB_FILE)
        return Job(raw["kind"], raw["id"], raw["key"], raw["attempt"], directory) if raw else None

    def state(self, job: Job) -> JobState:
        return JobState.RUNNING if _process(job) is not None else JobState.ENDED

    def explain(self, job: Job) -> str:
        process = _process(job)
        return f"process {process.pid}, on this machine" if process is not None else ""

    def log(self, job_or_path: Job | Path, offset: int) -> tuple[str, int]:
        if isinstance(job_or_path, Path):
            return read_from(job_or_path, offset)
        directory = job_or_path.directory
        assert directory is not None, "a job that a launcher returned knows its run directory"
        return read_from(directory / f"attempts/{job_or_path.attempt:02d}/log/supervisor.log", offset)

    def cancel(self, job: Job, grace_seconds: float) -> None:
        process = _process(job)
        if process is None:
            return
        members = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while _process(job) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()

    def _record(self, request: JobRequest, identity: str) -> Job:
        content = {"kind": self.kind, "id": identity, "key": request.key, "attempt": request.attempt}
        write_object(request.directory / JOB_FILE, content)
        return Job(**content, directory=request.directory)


@contextlib.contextmanager
def _stops_held() -> Iterator[None]:
    """A process started within begins with requests to stop blocked; see `JobRequest`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _identity(process: psutil.Process) -> str:
    """Pid and start time: a pid alone may belong to somebody else tomorrow."""
    return f"{process.pid}:{process.create_time():.2f}"


def _process(job: Job) -> psutil.Process | None:
    """The living supervisor of a job, or None."""
    pid, _, started = job.id.partition(":")
    if not pid.isdigit():
        return None
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        process = psutil.Process(int(pid))
        same = not started or abs(process.create_time() - float(started)) < 0.05
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
