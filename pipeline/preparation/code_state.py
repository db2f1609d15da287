"""Which code a run is made by: the commit, and what differs from it, so that it can be applied again.

Only the folders that a run executes are looked at, and only files that git follows: nothing private that lies about in
the clone gets into a run directory.
"""

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

from pipeline.redaction import secret_in

ROOT = Path(__file__).parents[2]
CODE = ("models", "pipeline", "cluster", "flows", "pyproject.toml")
MOST_BYTES = 1 << 20  # of a difference that is kept; of a larger one only the hash
# Whatever the person's own settings of git are: `git apply` must take it.
_PLAIN = ("--no-color", "--no-ext-diff", "--no-textconv", "--binary", "--src-prefix=a/", "--dst-prefix=b/")


def code_state(root: Path = ROOT) -> tuple[dict[str, Any], bytes | None]:
    """{commit, dirty, diff_sha256, diff_bytes, untracked}, and the difference where it is kept: not one with a secret.

    `untracked` names new files in the folders, which the difference has not. Without a repository: {version}.
    """
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"version": _version()}, None
    difference = _git(root, "diff", *_PLAIN, "HEAD", "--", *CODE) or b""
    untracked = (_git(root, "ls-files", "--others", "--exclude-standard", "--", *CODE) or b"").decode().splitlines()
    state = {
        "commit": commit.decode().strip(),
        "dirty": bool(difference or untracked),
        "diff_sha256": hashlib.sha256(difference).hexdigest() if difference else None,
        "diff_bytes": len(difference),
        "untracked": untracked[:100],
    }
    kept = difference and len(difference) <= MOST_BYTES and secret_in(difference.decode(errors="replace")) is None
    return state, difference if kept else None


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version() -> str | None:
    try:
        return importlib.metadata.version("vit-pretraining")
    except importlib.metadata.PackageNotFoundError:
        return None
