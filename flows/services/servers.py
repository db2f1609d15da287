"""The Prefect server, the MLflow server and the worker as child processes, and how to ask whether they answer.

Everything that these programs need is in the environment given to them, never in a file of the current directory:
`python -m prefect` and `python -m mlflow` are run as programs and never imported here.
"""

import base64
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from flows.services.processes import last_lines, log_path, start_part
from pipeline.errors import FaultError

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000
POOL = "local"
DEADLINE_SECONDS = 180.0  # of each part; measured: 18 s for all on two idle cores, 100 s for MLflow at a load of 13

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",  # Prefect's clients; MLflow reads only "true" here and has its own variable
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}


def free_port(preferred: int | None = None) -> int:
    """`preferred` where nobody listens on it, else any free port of the loopback interface."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            # A port that was closed a moment ago counts as free, as it does for the servers.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port or 0))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise FaultError(f"there is no free port on {HOST}")


def local_prefect_environment(home: Path, api_url: str) -> dict[str, str]:
    """What makes a process talk to the server of this home and to nothing else, whatever profile is active."""
    return NO_TELEMETRY | {"PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": api_url}


def own_environment() -> dict[str, str]:
    """This process's environment without the choice of a profile, which only exists in the person's PREFECT_HOME."""
    hidden = {"PREFECT_PROFILE", "PREFECT_PROFILES_PATH"}
    return {name: value for name, value in os.environ.items() if name not in hidden}


def start_prefect_server(home: Path, port: int, ui: bool = True) -> subprocess.Popen:
    """Start a Prefect server on `port`, with its database under `home/prefect`."""
    (home / "prefect").mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in own_environment().items() if name != "PREFECT_API_URL"}
    settings = NO_TELEMETRY | {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect' / 'prefect.db'}",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),  # with `--port` the UI would go on asking port 4200
        "PREFECT_SERVER_UI_ENABLED": str(ui).lower(),
    }
    return start_part("prefect", "prefect", ["--no-prompt", "server", "start"], home, environment | settings)


def start_mlflow_server(home: Path, port: int) -> subprocess.Popen:
    """Start an MLflow server on `port` over the same store that `flows.home.tracking_uri` names."""
    artifacts = (home / "artifacts").as_uri()
    arguments = ["--host", HOST, "--port", str(port), "--workers", "1"]  # 4 workers take 2.5 GB instead of 0.5
    arguments += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    # Experiments made through the server keep their artifacts where those made on the sqlite store keep them.
    arguments += ["--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    settings = NO_TELEMETRY | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return start_part("mlflow", "mlflow", ["server", *arguments], home, own_environment() | settings)


def start_deployments(home: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start the process that waits for the API, makes the work pool and every deployment, and ends."""
    return start_part("deployments", "flows.services.deployments", [], home, environment)


def start_worker(home: Path, name: str, environment: dict[str, str]) -> subprocess.Popen:
    """Start a process worker on the local pool; the flows that it runs find the home in VIT_HOME."""
    arguments = ["--no-prompt", "worker", "start", "--pool", POOL, "--type", "process", "--name", name]
    settings = {
        "VIT_HOME": str(home),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # Prefect's least; see flows/automations
    }
    return start_part("worker", "prefect", arguments, home, environment | settings)


def answers(url: str, timeout_seconds: float = 2.0) -> bool:
    """Whether an HTTP server answers `url` with success."""
    try:
        with urllib.request.urlopen(_request(url), timeout=timeout_seconds):
            return True
    except (OSError, ValueError):
        return False


def worker_heartbeat(api_url: str, name: str) -> str | None:
    """When the worker was last heard of, as the API writes it; None for one that is unknown or offline."""
    request = _request(f"{api_url}/work_pools/{POOL}/workers/filter", body={})
    try:
        with urllib.request.urlopen(request, timeout=5.0) as response:
            workers = json.load(response)
    except (OSError, ValueError):
        return None
    online = [worker for worker in workers if worker["name"] == name and worker["status"] == "ONLINE"]
    return online[0]["last_heartbeat_time"] if online else None


def wait_for(part: str, ready: Callable[[], bool], processes: dict[str, subprocess.Popen], home: Path) -> None:
    """Return when `ready`; raise FaultError with the last log lines when time is up or one of `processes` failed."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        failed = [
            name for name, process in processes.items() if process.poll() or (name == part and process.poll() == 0)
        ]
        if ready():
            return
        if failed:
            part, reason = failed[0], f"ended with exit code {processes[failed[0]].returncode}"
        elif time.monotonic() > deadline:
            reason = f"was not ready within {DEADLINE_SECONDS:.0f} s"
        else:
            time.sleep(0.1)
            continue
        log = log_path(home, part)
        raise FaultError(f"{part} {reason}; {log} ends with: {last_lines(log)}")


def _request(url: str, body: dict | None = None) -> urllib.request.Request:
    request = urllib.request.Request(url, data=None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if key := os.environ.get("PREFECT_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    elif secret := os.environ.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", "Basic " + base64.b64encode(secret.encode()).decode())
    return request
