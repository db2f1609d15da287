"""The Prefect server, the MLflow server and the worker as child processes, and how to ask whether they answer.

Everything that these programs need is in the environment given to them, never in a file of the current directory:
`python -m prefect` and `python -m mlflow` are run as programs and never imported here.
"""

import base64
import json
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from flows.services.processes import last_lines, log_path, start_part
from pipeline.errors import FaultError
from pipeline.registry.store_file import require_writable_database, share_database

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000
POOL = "local"  # of a stack that is one person's
DEADLINE_SECONDS = 180.0  # of each part; measured: 18 s for all on two idle cores, 100 s for MLflow at a load of 13

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",  # Prefect's clients; MLflow reads only "true" here and has its own variable
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
}


def local_prefect_environment(home: Path, api_url: str) -> dict[str, str]:
    """What makes a process talk to the server of this home and to nothing else, whatever profile is active."""
    return NO_TELEMETRY | {"PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": api_url}


def own_environment(without: Collection[str] = ()) -> dict[str, str]:
    """This process's environment without the choice of a profile, which only exists in the person's PREFECT_HOME."""
    hidden = {"PREFECT_PROFILE", "PREFECT_PROFILES_PATH", *without}
    return {name: value for name, value in os.environ.items() if name not in hidden}


def start_prefect_server(home: Path, port: int, ui: bool = True, team: Mapping[str, str] = {}) -> subprocess.Popen:
    """Start a Prefect server on `port`, with its database under `home/prefect`; `team` are settings of a team's."""
    (home / "prefect").mkdir(parents=True, exist_ok=True)
    if not team:
        require_writable_database(home / "prefect" / "prefect.db", "Prefect's database")
        share_database(home / "prefect" / "prefect.db")
    environment = {name: value for name, value in own_environment().items() if name != "PREFECT_API_URL"}
    settings = NO_TELEMETRY | {
        "PREFECT_HOME": str(home / "prefect"),
        # What it remembers of its last start is its starter's alone to read; in a group that is not always one person.
        "PREFECT_SERVER_MEMO_STORE_PATH": str(home / "prefect" / f"memo_store-{os.getuid()}.toml"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect' / 'prefect.db'}",
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),  # with `--port` the UI would go on asking port 4200
        "PREFECT_SERVER_UI_ENABLED": str(ui).lower(),
    }
    return start_part("prefect", "prefect", ["--no-prompt", "server", "start"], home, environment | settings | team)


def start_team_mlflow_server(home: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """Start an MLflow server that asks who it is talking to."""
    settings = NO_TELEMETRY | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | environment
    return start_part("mlflow", "mlflow", ["server", *arguments], home, own_environment() | settings)


def start_mlflow_server(home: Path, port: int) -> subprocess.Popen:
    """Start an MLflow server on `port` over the same store that `flows.home.tracking_uri` names."""
    require_writable_database(home / "mlflow.db", "MLflow store")
    share_database(home / "mlflow.db")
    artifacts = (home / "artifacts").as_uri()
    arguments = ["--host", HOST, "--port", str(port), "--workers", "1"]  # 4 workers take 2.5 GB instead of 0.5
    arguments += ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]
    # Experiments made through the server keep their artifacts where those made on the sqlite store keep them.
    arguments += ["--default-artifact-root", artifacts, "--artifacts-destination", artifacts]
    settings = NO_TELEMETRY | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return start_part("mlflow", "mlflow", ["server", *arguments], home, own_environment() | settings)


def start_deployments(
    home: Path, environment: dict[str, str], pool: str, suffix: str, profile: str | None = None
) -> subprocess.Popen:
    """Start the process that waits for the API, makes the work pool and every deployment, and ends."""
    arguments = [pool, suffix, profile or ""]
    return start_part("deployments", "flows.services.deployments", arguments, home, environment)


def start_worker(home: Path, name: str, environment: dict[str, str], pool: str = POOL) -> subprocess.Popen:
    """Start a process worker on a pool; the flows that it runs find the home in VIT_HOME."""
    arguments = ["--no-prompt", "worker", "start", "--pool", pool, "--type", "process", "--name", name]
    settings = {
        "VIT_HOME": str(home),
        "TMPDIR": str(_own_temporary_folder()),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # Prefect's least; see flows/automations
    }
    return start_part("worker", "prefect", arguments, home, environment | settings)


def _own_temporary_folder() -> Path:
    """Where the worker keeps what it needs for a while: Prefect's /tmp/runner_storage is its first user's alone."""
    own = Path(tempfile.gettempdir()) / f"vit-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    return own if own.stat().st_uid == os.getuid() and not own.is_symlink() else Path(tempfile.mkdtemp(prefix="vit-"))


def answers(url: str, timeout_seconds: float = 2.0) -> bool:
    """Whether an HTTP server answers `url` with success; nothing is asked that needs credentials."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds):
            return True
    except (OSError, ValueError):
        return False


def prefect_refusal(api_url: str) -> str | None:
    """Why a Prefect API that answers would take nothing from us, in a line; None where it takes what we say."""
    try:
        with urllib.request.urlopen(_prefect_request(f"{api_url}/work_pools/filter", {"limit": 1}), timeout=5.0):
            return None
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            given = "does not know the" if _prefect_credentials() else "asks for a"
            return f"{given} user and password ({error.code}); set PREFECT_API_AUTH_STRING=user:password"
    except (OSError, ValueError):
        pass
    return None


def mlflow_refusal(url: str) -> str | None:
    """Why an MLflow server that answers would take nothing from us, in a line; None where it takes what we say."""
    if not url.startswith("http"):
        return None
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search?max_results=1")
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    elif user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        request.add_header("Authorization", _basic(f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"))
    try:
        with urllib.request.urlopen(request, timeout=5.0):
            return None
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            given = "does not know the" if request.has_header("Authorization") else "asks for a"
            return (
                f"{given} user and password ({error.code}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
    except (OSError, ValueError):
        pass
    return None


def worker_heartbeat(api_url: str, name: str, pool: str) -> str | None:
    """When the worker was last heard of, as the API writes it; None for one that is unknown or offline."""
    request = _prefect_request(f"{api_url}/work_pools/{pool}/workers/filter", {})
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


def _prefect_request(url: str, body: dict) -> urllib.request.Request:
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    if (credentials := _prefect_credentials()) is not None:
        request.add_header("Authorization", credentials)
    return request


def _prefect_credentials() -> str | None:
    """What Prefect's own clients say of themselves; told to no other server."""
    if key := os.environ.get("PREFECT_API_KEY"):
        return f"Bearer {key}"
    secret = os.environ.get("PREFECT_API_AUTH_STRING")
    return _basic(secret) if secret else None


def _basic(secret: str) -> str:
    return "Basic " + base64.b64encode(secret.encode()).decode()
