"""The home directory of runs, records and servers, a person's or a group's, and what it says.

`D/{stack.json, mlflow.db, artifacts/, prefect/, runs/, lifecycles/, data/, logs/}`; D is `--dir`, else
$VIT_HOME, else ~/.vit.
Of a home whose servers are a team's, `D/team.json` says where they are, also while they are down.
Imports neither torch nor Prefect nor MLflow, so every command can ask it at no cost.
"""

import contextlib
import json
import os
import stat
from pathlib import Path

from flows.credentials import without_passwords_in_urls


def home_directory(option: str | None = None) -> Path:
    """The absolute home: `option` (`--dir`), else $VIT_HOME, else ~/.vit. It need not exist yet.

    In a home that its group may write, all that this process makes from now on is the group's too (umask).
    """
    home = Path(option or os.environ.get("VIT_HOME") or "~/.vit").expanduser().resolve()
    with contextlib.suppress(OSError):
        mode = home.stat().st_mode
        if mode & stat.S_IWGRP:
            closed = 0 if mode & stat.S_IRWXO else stat.S_IRWXO
            os.umask(os.umask(0o077) & ~stat.S_IRWXG | closed)
    return home


def tracking_uri(home: Path) -> str:
    """The MLflow store of this home: MLFLOW_TRACKING_URI where it is set, else the team's, else `home/mlflow.db`.

    A password that stands in the URL is moved to where MLflow's clients look for it: no file and no line has it.
    """
    without_passwords_in_urls()
    named = os.environ.get("MLFLOW_TRACKING_URI") or team_servers(home).get("mlflow_url")
    return named or f"sqlite:///{home / 'mlflow.db'}"


def team_servers(home: Path) -> dict[str, str]:
    """Where the servers of this home are, {prefect_api_url, mlflow_url}, if they are a team's; else {}."""
    try:
        servers = json.loads((home / "team.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return servers if isinstance(servers, dict) else {}


def write_team_servers(home: Path, prefect_api_url: str, mlflow_url: str) -> None:
    """Have every command in this home use these servers from now on."""
    path = home / "team.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"format": 1, "prefect_api_url": prefect_api_url, "mlflow_url": mlflow_url}) + "\n")
    os.replace(partial, path)


def read_stack(home: Path) -> dict | None:
    """What the last `vit up` in this home wrote, None where there is none or where it cannot be read.

    The record says what was started, not that it still lives: `flows.services.stack.status` asks the processes.
    """
    try:
        stack = json.loads(stack_path(home).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return stack if isinstance(stack, dict) else None


def write_stack(home: Path, stack: dict) -> None:
    """Write the record of a started stack in one step, so that no reader sees half of it."""
    partial = stack_path(home).with_suffix(".partial")
    partial.write_text(json.dumps(stack, indent=2) + "\n")
    os.replace(partial, stack_path(home))


def stack_path(home: Path) -> Path:
    return home / "stack.json"
