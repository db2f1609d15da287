"""The home directory of a person's runs, records and local stack, and what it says.

`D/{stack.json, mlflow.db, artifacts/, prefect/, runs/, data/, logs/}`; D is `--dir`, else $VIT_HOME, else ~/.vit.
Imports neither torch nor Prefect nor MLflow, so every command can ask it at no cost.
"""

import json
import os
from pathlib import Path


def home_directory(option: str | None = None) -> Path:
    """The absolute home: `option` (`--dir`), else $VIT_HOME, else ~/.vit. It need not exist yet."""
    return Path(option or os.environ.get("VIT_HOME") or "~/.vit").expanduser().resolve()


def tracking_uri(home: Path) -> str:
    """The MLflow store of this home: MLFLOW_TRACKING_URI (a team's) where it is set, else `home/mlflow.db`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"


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
