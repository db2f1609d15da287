"""A Prefect server for the length of one command: for `vit quickstart`, and for whoever has none.

Flows are imported inside the block, never before it: Prefect reads its settings when it is first imported.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from flows.home import read_stack
from flows.services.servers import (
    HOST,
    answers,
    local_prefect_environment,
    start_prefect_server,
    wait_for,
)
from pipeline.ports import free_port

STOP_SECONDS = 10.0


@contextlib.contextmanager
def prefect_server(home: Path, report: Callable[[str], None] = lambda line: None) -> Iterator[str]:
    """Have PREFECT_API_URL in this process's environment name a server that answers, and yield that URL.

    It is the one already named there, else the one that `vit up` started in this home, else one that is started here on
    a free port (data under `home/prefect`) and ends with the block, also on an exception, SIGTERM or SIGHUP.
    Must be entered before Prefect is imported; the environment is as before afterwards.
    """
    if named := os.environ.get("PREFECT_API_URL"):
        report(f"Prefect: {named} (from PREFECT_API_URL)")
        yield named
        return
    assert "prefect" not in sys.modules, "prefect_server must be entered before prefect is imported"
    if running := _server_of_stack(home):
        report(f"Prefect: {running} (from `vit up`)")
        with _environment(local_prefect_environment(home, running)):
            yield running
        return

    port = free_port()
    url = f"http://{HOST}:{port}/api"
    with _stop_signals_raise(), _ended(start_prefect_server(home, port, ui=False)) as process:
        wait_for("prefect", lambda: answers(f"{url}/health"), {"prefect": process}, home)
        report(f"Prefect: {url} (ends with this command)")
        with _environment(local_prefect_environment(home, url)):
            yield url


def _server_of_stack(home: Path) -> str | None:
    stack = read_stack(home) or {}
    url = stack.get("prefect_api_url")
    return url if "prefect" in stack.get("pids", {}) and answers(f"{url}/health") else None


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    try:
        yield process
    finally:
        server = [psutil.Process(process.pid)] if process.poll() is None else []
        family = server + [child for each in server for child in each.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for each in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """`changes` in os.environ; the choice of a profile is hidden, for it only exists in the person's PREFECT_HOME."""
    before = dict(os.environ)
    os.environ.update(changes)
    for name in ("PREFECT_PROFILE", "PREFECT_PROFILES_PATH"):
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _stop_signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end this block like an exception would, where nobody else handles them."""

    def leave(signal_number: int, frame: object) -> None:
        raise SystemExit(128 + signal_number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for each in ours:
        signal.signal(each, leave)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)
