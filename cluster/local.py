"""Jobs on this machine: a process group of its own per job, found again by pid and start time."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.job import Job, JobRequest, JobState

JOB_FILE = "job.json"


class LocalLauncher:
    """Starts each job in its own session, so that it outlives the terminal and takes no Ctrl-C by accident."""

    kind = "local"

    def submit(self, request: JobRequest) -> Job:
        with _lock(request.directory):
            existing = self.find(request.directory)
            if existing is not None and self.state(existing) is JobState.RUNNING:
                return existing
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

    def find(self, directory: Path) -> Job | None:
        try:
            raw = json.loads((directory / JOB_FILE).read_text())
        except FileNotFoundError:
            return None
        return Job(raw["kind"], raw["id"], raw["key"], raw["attempt"])

    def state(self, job: Job) -> JobState:
        return JobState.RUNNING if _process(job) is not None else JobState.ENDED

    def log(self, request_log: Path, offset: int) -> tuple[str, int]:
        if not request_log.exists():
            return "", offset
        with open(request_log, "rb") as file:
            file.seek(offset)
            content = file.read()
        return content.decode(errors="replace"), offset + len(content)

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
        job = Job(self.kind, identity, request.key, request.attempt)
        temporary = request.directory / f".{JOB_FILE}.tmp"
        temporary.write_text(json.dumps(job.__dict__, indent=2) + "\n")
        os.replace(temporary, request.directory / JOB_FILE)
        return job


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with open(directory / ".submit.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
