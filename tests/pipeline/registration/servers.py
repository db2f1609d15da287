"""A real MLflow server on loopback that takes and gives artifacts over HTTP alone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipeline.ports import free_port

DEADLINE_SECONDS = 120


def wait_until_answers(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def path_with_scripts() -> str:
    """PATH with the scripts of this environment, which servers start."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@contextlib.contextmanager
def process_on(port: int, arguments: list[str], log: Path, path: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A module of Python's as a server that answers `path` on a port; killed with all its children at the end."""
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=out, stderr=out, start_new_session=True,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path_with_scripts()} | environment,
        )  # fmt: skip
    try:
        wait_until_answers(f"http://127.0.0.1:{port}{path}", process, log)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[int]:
    """The port of an MLflow server whose artifacts nobody reaches but through it."""
    port = free_port()
    arguments = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--serve-artifacts"]
    arguments += ["--artifacts-destination", f"file://{folder / 'artifacts'}"]
    with process_on(port, arguments, folder / "server.log", "/health", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        yield port
