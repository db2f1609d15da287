"""An environment of its own for every peer whose requirements the project's environment does not hold.

Made by uv on the first run, beside torch, torchvision and Pillow of the project's versions, and kept; uv links what it
has already, so that one costs little disk. The project's own environment is never changed.
"""

import hashlib
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks.contestant import ROOT, ContestantError
from tests.benchmarks.workspace import kept_directory

SHARED = ("torch", "torchvision", "pillow")


def interpreter(requirements: tuple[str, ...]) -> Path:
    """The Python that has `requirements`; ContestantError with the installer's reason where it cannot be made."""
    if not requirements:
        return Path(sys.executable)
    uv = shutil.which("uv")
    if uv is None:
        raise ContestantError(f"needs {', '.join(requirements)} in an environment of its own, and uv is not on PATH")
    wanted = [*(f"{package}=={version(package).partition('+')[0]}" for package in SHARED), *requirements]
    digest = hashlib.sha256("\n".join([platform.python_version(), *wanted]).encode()).hexdigest()[:12]
    environment = kept_directory() / "environments" / f"{requirements[0].partition('=')[0]}-{digest}"
    python, finished = environment / "bin" / "python", environment / "finished"
    if not finished.exists():
        shutil.rmtree(environment, ignore_errors=True)
        _run(uv, "venv", "--quiet", "--python", sys.executable, str(environment))
        _run(uv, "pip", "install", "--quiet", "--python", str(python), *wanted)
        finished.touch()
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ContestantError(" ".join(done.stderr.split())[:200] or f"{command[0]} exited {done.returncode}")
