"""The stack: one Prefect server, one MLflow server, one worker and every deployment, for one home directory.

`up` starts it, `down` ends it with everything that it started, `status` says what lives. The record of a started stack
is `home/stack.json`; what really lives is asked of the processes (see services/processes). A Prefect API or an MLflow
store that the environment already names (a team's, Prefect Cloud) is used and never replaced. With a team's profile the
servers are for others too: on PostgreSQL, and asking who is there (see services/team).
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.credentials import without_secrets
from flows.home import read_stack, stack_path, team_servers, write_stack, write_team_servers
from flows.services import servers
from flows.services.ownership import by_whom, is_whole, living_parts, owner, require_ours
from flows.services.processes import end_processes, jobs_and_below, stack_processes
from flows.services.profile import activate_profile, remember_profile, restore_profile
from flows.services.team import (
    MlflowServer,
    PrefectServer,
    TeamProfile,
    mlflow_arguments,
    mlflow_environment,
    prefect_settings,
    require_database,
)
from pipeline.errors import InputError
from pipeline.ports import free_port

FORMAT_VERSION = 1
SERVERS = ("prefect", "mlflow")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Service:
    """One of the two servers: its address, the one at which this machine asks it, and the process if started here."""

    url: str
    asked: str
    process: subprocess.Popen | None


def up(
    home: Path, data: str | None = None, report: Report = lambda line: None, team: TeamProfile | None = None
) -> dict:
    """Start the stack of `home`, make the deployments and activate the Prefect profile; return the record of it.

    Returns when everything answers. InputError: a stack is up in this home already, `data` is no dataset, or a team's
    server does not answer. FaultError: a part did not start; its last log lines are in the message, and what had been
    started is ended.

    Args:
        data: the dataset directory that flows use where they are given none.
        report: called with one line per step.
        team: starts servers for others than this person.
    """
    dataset = _dataset(data)
    home.mkdir(parents=True, exist_ok=True)
    with _alone_in(home):
        _require_whose(home, team)
        _clear_the_way(home, report)
        previous = None if os.environ.get("PREFECT_API_URL") else remember_profile()
        try:
            stack = {"format": FORMAT_VERSION, "home": str(home), "data": dataset, "previous_profile": previous}
            stack |= owner() | {"servers": "local" if team is None else "team"}
            stack |= _start_parts(home, report, team)
            if team is not None:
                write_team_servers(home, stack["prefect_api_url"], stack["mlflow_url"])
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
        require_ours(home, stack, "end")
        processes = stack_processes(home)
        if jobs := [process for process, below in jobs_and_below(set(processes)).items() if not below]:
            report(f"{len(jobs)} training job(s) asked to stop with a checkpoint")
        ended = _end_in_order(lambda: stack_processes(home), stack)
        if stack:
            _forget(home, stack)
    report(f"{ended} processes ended in {home}" if stack or ended else f"nothing is running in {home}")
    return ended


def status(home: Path) -> list[dict]:
    """One row per part of the stack in `home`: part, url, pid, alive, answering, and what is wrong, if anything.

    No rows where none was started. `pid` and `alive` are None for a server that was not started here, `alive` also
    where the process is on another machine.
    """
    stack = read_stack(home)
    if stack is None:
        return []
    living, api, mlflow = living_parts(home, stack), stack["prefect_api_url"], stack["mlflow_url"]
    answering = {"prefect": _prefect_answers(api), "mlflow": _mlflow_answers(mlflow)}
    refused = {"prefect": servers.prefect_refusal(api), "mlflow": servers.mlflow_refusal(mlflow)}
    pool = stack.get("pool", servers.POOL)
    answering["worker"] = servers.worker_heartbeat(api, stack["worker"], pool) is not None
    urls = {"prefect": stack["prefect_ui_url"], "mlflow": mlflow, "worker": None}
    return [
        {
            "part": part,
            "url": urls[part],
            "pid": stack["pids"].get(part),
            "alive": None if living is None or part not in stack["pids"] else part in living,
            "answering": answering[part] and not refused.get(part),
            "fault": refused.get(part) or (refused["prefect"] if part == "worker" else None),
        }
        for part in urls
    ]


def _require_whose(home: Path, team: TeamProfile | None) -> None:
    """InputError where the home's records are in a team's servers, and others were to be started for it."""
    theirs = team_servers(home)
    if team is None and theirs and not (os.environ.get("PREFECT_API_URL") and os.environ.get("MLFLOW_TRACKING_URI")):
        raise InputError(
            f"{home}: its records are in its team's servers, {theirs['mlflow_url']}; hint: `vit up --profile team` (or "
            f"the file of its profile), another --dir, or make it a home of its own: rm {home / 'team.json'}"
        )


def _start_parts(home: Path, report: Report, team: TeamProfile | None) -> dict:
    """Start what is not there, wait until it answers, and describe it. The two servers start at the same time."""
    begin = time.monotonic()

    def ready(part: str, answers: Callable[[], bool], line: str) -> None:
        if part in processes:
            servers.wait_for(part, answers, processes, home)
            report(f"{line} ({time.monotonic() - begin:.0f} s)")

    pool, suffix, profile = servers.POOL, "", None
    if team is not None:
        pool, suffix, profile = team.pool, team.deployment_suffix, team.profile
    _require_startable(team)
    prefect, environment = _prefect_service(home, report, team)
    mlflow = _mlflow_service(home, report, team)
    if team is not None:
        environment |= {"MLFLOW_TRACKING_URI": mlflow.url}
    processes = {part: each.process for part, each in (("prefect", prefect), ("mlflow", mlflow)) if each.process}
    processes["deployments"] = servers.start_deployments(home, environment, pool, suffix, profile)
    ready("prefect", lambda: _prefect_answers(prefect.asked), f"Prefect server: {_ui_url(prefect.url)}")
    _require_accepted("Prefect", prefect.url, servers.prefect_refusal)

    name = _worker_name(home)
    before = servers.worker_heartbeat(prefect.url, name, pool)
    processes["worker"] = servers.start_worker(home, name, environment, pool)
    ready("deployments", lambda: processes["deployments"].poll() == 0, "deployments made")
    ready("mlflow", lambda: _mlflow_answers(mlflow.asked), f"MLflow server: {mlflow.url}")
    _require_accepted("MLflow", mlflow.url, servers.mlflow_refusal)
    silent = (None, before)
    ready("worker", lambda: servers.worker_heartbeat(prefect.url, name, pool) not in silent, f"worker: pool `{pool}`")

    pids = {part: process.pid for part, process in processes.items() if part != "deployments"}
    return {
        "prefect_api_url": without_secrets(prefect.url),
        "prefect_ui_url": _ui_url(prefect.url),
        "mlflow_url": without_secrets(mlflow.url),
        "pool": pool,
        "worker": name,
        "pids": pids,
        "started": {part: psutil.Process(pid).create_time() for part, pid in pids.items()},
    }


def _require_accepted(what: str, url: str, refusal: Callable[[str], str | None]) -> None:
    if reason := refusal(url):
        raise InputError(f"{what} at {without_secrets(url)} {reason}")


def _require_startable(team: TeamProfile | None) -> None:
    """InputError where a server that is to be started here would find its port taken or its database closed."""
    named = {"prefect": "PREFECT_API_URL", "mlflow": "MLFLOW_TRACKING_URI"}
    parts = {} if team is None else {"prefect": team.prefect, "mlflow": team.mlflow}
    here = {part: server for part, server in parts.items() if server and not os.environ.get(named[part])}
    for part, server in here.items():
        _require_free(team, part, server.port)
    for part, server in here.items():
        require_database(part, server)


def _prefect_service(home: Path, report: Report, team: TeamProfile | None) -> tuple[Service, dict[str, str]]:
    """The Prefect API, and the environment of processes that talk to it: without what only a server may see."""
    secret = set() if team is None else team.secret_variables()
    if named := os.environ.get("PREFECT_API_URL"):
        url = named.rstrip("/")
        if not _prefect_answers(url, timeout_seconds=10.0):
            raise InputError(
                f"PREFECT_API_URL={without_secrets(url)} does not answer; hint: unset it to start a local server"
            )
        report(f"Prefect: {without_secrets(url)} from PREFECT_API_URL is used, no server is started")
        environment = {name: value for name, value in os.environ.items() if name not in secret}
        return Service(url, url, None), environment | servers.NO_TELEMETRY
    if team is None:
        port = free_port(servers.HOST, servers.PREFECT_PORT)
        url = asked = f"http://{servers.HOST}:{port}/api"
        process = servers.start_prefect_server(home, port)
    else:
        assert isinstance(team.prefect, PrefectServer), "load_team has seen to it"
        port = team.prefect.port
        url, asked = f"http://{team.host}:{port}/api", f"http://{_near(team)}:{port}/api"
        process = servers.start_prefect_server(home, port, team=prefect_settings(team, team.prefect))
    return Service(url, asked, process), servers.own_environment(secret) | servers.local_prefect_environment(home, url)


def _mlflow_service(home: Path, report: Report, team: TeamProfile | None) -> Service:
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        report(f"MLflow: {without_secrets(named)} from MLFLOW_TRACKING_URI is used, no server is started")
        return Service(named, named, None)
    if team is None:
        port = free_port(servers.HOST, servers.MLFLOW_PORT)
        url = f"http://{servers.HOST}:{port}"
        return Service(url, url, servers.start_mlflow_server(home, port))
    assert isinstance(team.mlflow, MlflowServer), "load_team has seen to it"
    port = team.mlflow.port
    process = servers.start_team_mlflow_server(
        home, mlflow_arguments(team, team.mlflow, home), mlflow_environment(team.mlflow, home)
    )
    return Service(f"http://{team.host}:{port}", f"http://{_near(team)}:{port}", process)


def _near(team: TeamProfile) -> str:
    """Where this machine reaches what listens as the profile says."""
    return servers.HOST if team.listen == "0.0.0.0" else team.listen


def _require_free(team: TeamProfile, part: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((team.listen, port))
        except OSError as error:
            raise InputError(
                f"{part}.port {port} on {team.listen}: {error.strerror}; choose another in the team's profile, or "
                f"listen elsewhere"
            ) from None


def _activate(stack: dict, report: Report) -> None:
    if stack["previous_profile"] is None:
        return
    activate_profile(stack["previous_profile"], stack["prefect_api_url"])
    if chosen := os.environ.get("PREFECT_PROFILE"):
        report(f"PREFECT_PROFILE={chosen} hides the profile `vit` in this shell; hint: unset PREFECT_PROFILE")


def _clear_the_way(home: Path, report: Report) -> None:
    """Refuse where a whole stack is up; end what is left of one that died. Its training jobs go on."""
    stack = read_stack(home)
    if stack and is_whole(home, stack):
        raise InputError(
            f"a stack is already up in {home}{by_whom(stack)}: Prefect {stack['prefect_ui_url']}, "
            f"MLflow {stack['mlflow_url']}; hint: stop it with `vit down --dir {home}`"
        )
    require_ours(home, stack, "replace")
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
    return without_secrets(named or api_url.removesuffix("/api"))


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
    with (home / ".stack.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another `vit up` or `vit down` is at work in {home}") from None
        yield
