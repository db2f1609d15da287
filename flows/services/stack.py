"""The local stack: one Prefect server, one MLflow server, one worker and every deployment, for one home directory.

`up` starts it, `down` ends it with everything that it started, `status` says what lives. The record of a started stack
is `home/stack.json`; what really lives is asked of the processes (see services/processes). A Prefect API or an MLflow
store that the environment already names (a team's) is used and never replaced.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.home import read_stack, stack_path, write_stack
from flows.services import servers
from flows.services.processes import end_processes, jobs_and_below, stack_processes
from flows.services.profile import activate_profile, remember_profile, restore_profile
from pipeline.errors import InputError

FORMAT_VERSION = 1
SERVERS = ("prefect", "mlflow")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Service:
    """One of the two servers: where it is, and the process if it was started here (None: a team's)."""

    url: str
    process: subprocess.Popen | None


def up(home: Path, data: str | None = None, report: Report = lambda line: None) -> dict:
    """Start the stack of `home`, make the deployments and activate the Prefect profile; return the record of it.

    Returns when everything answers. InputError: a stack is up in this home already, `data` is no dataset, or a team's
    server does not answer. FaultError: a part did not start; its last log lines are in the message, and what had been
    started is ended.

    Args:
        data: the dataset directory that flows use where they are given none.
        report: called with one line per step.
    """
    dataset = _dataset(data)
    home.mkdir(parents=True, exist_ok=True)
    with _alone_in(home):
        _clear_the_way(home, report)
        previous = None if os.environ.get("PREFECT_API_URL") else remember_profile()
        try:
            stack = {"format": FORMAT_VERSION, "home": str(home), "data": dataset, "previous_profile": previous}
            stack |= _start_parts(home, report)
            write_stack(home, stack)
            _activate(stack, report)
        except BaseException:
            _end_in_order(lambda: _orchestration(home), None)
            stack_path(home).unlink(missing_ok=True)
            raise
    return stack


def down(home: Path, report: Report = lambda line: None) -> int:
    """End every process that `up` started in `home` and all that came of them; return how many there were.

    The worker, its flow runs and their local jobs first (a job is given time to write its checkpoint), the servers
    last, so that the runs can still say how they ended. Jobs on a cluster go on. The Prefect profile that was active
    before is restored.
    """
    if not home.is_dir():
        report(f"nothing is running in {home}")
        return 0
    with _alone_in(home):
        stack = read_stack(home)
        processes = stack_processes(home)
        if jobs := [process for process, below in jobs_and_below(set(processes)).items() if not below]:
            report(f"{len(jobs)} training job(s) asked to stop with a checkpoint")
        ended = _end_in_order(lambda: stack_processes(home), stack)
        if stack:
            _forget(home, stack)
    report(f"{ended} processes ended in {home}" if stack or ended else f"nothing is running in {home}")
    return ended


def status(home: Path) -> list[dict]:
    """One row per part of the stack in `home`: part, url, pid, alive, answering; no rows where none was started.

    `pid` and `alive` are None for a team's server.
    """
    stack = read_stack(home)
    if stack is None:
        return []
    living = _living_parts(home, stack)
    answering = {
        "prefect": _prefect_answers(stack["prefect_api_url"]),
        "mlflow": _mlflow_answers(stack["mlflow_url"]),
        "worker": servers.worker_heartbeat(stack["prefect_api_url"], stack["worker"]) is not None,
    }
    urls = {"prefect": stack["prefect_ui_url"], "mlflow": stack["mlflow_url"], "worker": None}
    return [
        {
            "part": part,
            "url": urls[part],
            "pid": stack["pids"].get(part),
            "alive": part in living if part in stack["pids"] else None,
            "answering": answering[part],
        }
        for part in urls
    ]


def _start_parts(home: Path, report: Report) -> dict:
    """Start what is not there, wait until it answers, and describe it. The two servers start at the same time."""
    begin = time.monotonic()

    def ready(part: str, answers: Callable[[], bool], line: str) -> None:
        if part in processes:
            servers.wait_for(part, answers, processes, home)
            report(f"{line} ({time.monotonic() - begin:.0f} s)")

    prefect, environment = _prefect_service(home, report)
    mlflow = _mlflow_service(home, report)
    processes = {part: each.process for part, each in (("prefect", prefect), ("mlflow", mlflow)) if each.process}
    processes["deployments"] = servers.start_deployments(home, environment)
    ready("prefect", lambda: _prefect_answers(prefect.url), f"Prefect server: {_ui_url(prefect.url)}")

    name = _worker_name(home)
    before = servers.worker_heartbeat(prefect.url, name)
    processes["worker"] = servers.start_worker(home, name, environment)
    ready("deployments", lambda: processes["deployments"].poll() == 0, "deployments made")
    ready("mlflow", lambda: _mlflow_answers(mlflow.url), f"MLflow server: {mlflow.url}")
    silent = (None, before)
    ready("worker", lambda: servers.worker_heartbeat(prefect.url, name) not in silent, f"worker: pool `{servers.POOL}`")

    pids = {part: process.pid for part, process in processes.items() if part != "deployments"}
    return {
        "prefect_api_url": _without_secrets(prefect.url),
        "prefect_ui_url": _ui_url(prefect.url),
        "mlflow_url": _without_secrets(mlflow.url),
        "worker": name,
        "pids": pids,
        "started": {part: psutil.Process(pid).create_time() for part, pid in pids.items()},
    }


def _prefect_service(home: Path, report: Report) -> tuple[Service, dict[str, str]]:
    """The Prefect API, and the environment of processes that talk to it."""
    if named := os.environ.get("PREFECT_API_URL"):
        url = named.rstrip("/")
        if not _prefect_answers(url, timeout_seconds=10.0):
            raise InputError(
                f"PREFECT_API_URL={_without_secrets(url)} does not answer; hint: unset it to start a local server"
            )
        report(f"Prefect: {_without_secrets(url)} from PREFECT_API_URL is used, no server is started")
        return Service(url, None), os.environ | servers.NO_TELEMETRY
    port = servers.free_port(servers.PREFECT_PORT)
    url = f"http://{servers.HOST}:{port}/api"
    process = servers.start_prefect_server(home, port)
    return Service(url, process), servers.own_environment() | servers.local_prefect_environment(home, url)


def _mlflow_service(home: Path, report: Report) -> Service:
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        report(f"MLflow: {_without_secrets(named)} from MLFLOW_TRACKING_URI is used, no server is started")
        return Service(named, None)
    port = servers.free_port(servers.MLFLOW_PORT)
    return Service(f"http://{servers.HOST}:{port}", servers.start_mlflow_server(home, port))


def _activate(stack: dict, report: Report) -> None:
    if stack["previous_profile"] is None:
        return
    activate_profile(stack["previous_profile"], stack["prefect_api_url"])
    if chosen := os.environ.get("PREFECT_PROFILE"):
        report(f"PREFECT_PROFILE={chosen} hides the profile `vit` in this shell; hint: unset PREFECT_PROFILE")


def _clear_the_way(home: Path, report: Report) -> None:
    """Refuse where a whole stack is up; end what is left of one that died. Its training jobs go on."""
    stack = read_stack(home)
    if stack and _living_parts(home, stack) == set(stack["pids"]):
        raise InputError(
            f"a stack is already up in {home}: Prefect {stack['prefect_ui_url']}, MLflow {stack['mlflow_url']}; "
            f"hint: stop it with `vit down --dir {home}`"
        )
    if stack:
        report(f"the stack that was in {home} has died; what is left of it is ended, its training jobs go on")
    _end_in_order(lambda: _orchestration(home), stack)
    if stack:
        _forget(home, stack)


def _end_in_order(find: Callable[[], dict[psutil.Process, str]], stack: dict | None) -> int:
    """End what `find` finds: flow runs and their jobs, then the worker, then the servers."""
    pid = (stack or {}).get("pids", {}).get("worker")
    worker = {each for each, part in find().items() if part == "worker" and each.pid == pid}
    # A worker that is asked to stop kills its flow runs at once, and they read Running for ever. So it is held still,
    # neither stopping nor starting runs, while the flow runs report how they ended.
    with _held(worker):
        ended = end_processes(lambda: {each for each, part in find().items() if part not in SERVERS} - worker)
    ended += end_processes(lambda: [each for each, part in find().items() if part not in SERVERS])
    return ended + end_processes(find)


@contextlib.contextmanager
def _held(processes: set[psutil.Process]) -> Iterator[None]:
    """Stop the processes with SIGSTOP for the length of the block."""
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def _forget(home: Path, stack: dict) -> None:
    if stack["previous_profile"] is not None:
        restore_profile(stack["previous_profile"], stack["prefect_api_url"], _prefect_answers)
    stack_path(home).unlink(missing_ok=True)


def _living_parts(home: Path, stack: dict) -> set[str]:
    """The parts whose process still is the one that was started: same number, same start, same home."""
    starts = {process.pid: process.create_time() for process in stack_processes(home)}
    pids, started = stack["pids"], stack["started"]
    return {part for part, pid in pids.items() if pid in starts and abs(starts[pid] - started[part]) < 1.0}


def _orchestration(home: Path) -> dict[psutil.Process, str]:
    """The processes of the stack without its training jobs."""
    processes = stack_processes(home)
    jobs = jobs_and_below(set(processes))
    return {process: part for process, part in processes.items() if process not in jobs}


def _prefect_answers(api_url: str, timeout_seconds: float = 2.0) -> bool:
    return servers.answers(f"{api_url}/health", timeout_seconds)


def _mlflow_answers(url: str) -> bool:
    return servers.answers(f"{url}/health") if url.startswith("http") else True


def _ui_url(api_url: str) -> str:
    """Where people look: for a team's API what PREFECT_UI_URL says, else the API's address without `/api`."""
    named = os.environ.get("PREFECT_UI_URL") if os.environ.get("PREFECT_API_URL") else None
    return _without_secrets(named or api_url.removesuffix("/api"))


def _without_secrets(url: str) -> str:
    """`url` without a user and password in it, for records and messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in url else url


def _worker_name(home: Path) -> str:
    """The same for every `up` in this home, and no other home's, so that the worker page of a server stays short."""
    return f"vit-{socket.gethostname()}-{hashlib.sha256(str(home).encode()).hexdigest()[:8]}"


def _dataset(data: str | None) -> str | None:
    if data is None or "://" in data:
        return data
    path = Path(data).expanduser().resolve()
    if not (path / "index.json").is_file():
        raise InputError(
            f"--data {data}: no dataset there (no {path / 'index.json'}); hint: make one with `vit ingest`"
        )
    return str(path)


@contextlib.contextmanager
def _alone_in(home: Path) -> Iterator[None]:
    """Hold the home's lock: two `up` or `down` at once would end each other's processes."""
    with (home / ".stack.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another `vit up` or `vit down` is at work in {home}") from None
        yield
