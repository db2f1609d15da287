"""What would stop a job on this machine minutes after its start, found before it is submitted. Torch-free."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pipeline.budget import require_hours_left
from pipeline.checkpoints.mirror import CheckpointMirror
from pipeline.config.recipe import read_yaml
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import FaultError, InputError
from pipeline.run_directory import RunDirectory
from pipeline.supervision.liveness import running_elsewhere
from pipeline.words import bytes_in_words

LEAST_FREE_BYTES = 64 << 20  # for logs and the ledger; checkpoints are counted where they are written
HELD_SECONDS = 300.0  # that a build may hold its lock without a compiler at work
SHARED_MEMORY_PER_RANK = 32 << 20  # NCCL's buffers between the accelerators of a node
SHARED_MEMORY = Path("/dev/shm")


def require_ready(run: RunDirectory, accelerators: int) -> None:
    """InputError with one line per obstacle that a person has to remove first; this machine shows `accelerators`."""
    problems = _writing(run.path)
    if read_yaml(run.profile_file).get("kind") == "local":  # any other runs elsewhere
        problems += [*_elsewhere(run), *_locks(extensions_directory())]
        problems += [*_shared_memory(run.plan()), *_accelerators(run.plan(), accelerators)]
    if problems:
        raise InputError(*problems)
    config = read_run_config(run.path)
    if isinstance(config, TrainingConfig):
        require_hours_left(run, config.budget_gpu_hours)
        require_mirror(run, config.checkpoint.mirror)


def require_writable(run: RunDirectory) -> None:
    """InputError where nothing can be written to the run directory."""
    if problems := _writing(run.path):
        raise InputError(*problems)


def require_mirror(run: RunDirectory, url: str | None) -> None:
    """Claim the place of the run's copies: InputError where it cannot be written, or is another run's.

    FaultError where it does not answer, but not of a run that has checkpoints: that one goes on without copies.
    """
    if url is None:
        return
    try:
        CheckpointMirror(url, run).claim()
    except InputError as error:
        raise InputError(*(f"checkpoint.mirror: {problem}" for problem in error.problems)) from None
    except FaultError as error:
        if run.newest_checkpoint() is None:
            raise FaultError(f"checkpoint.mirror: {error}") from None


def _writing(path: Path) -> list[str]:
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        return [f"{path}: the run directory cannot be written: {error.strerror}; choose another --run-dir"]
    free = shutil.disk_usage(path).free
    if free < LEAST_FREE_BYTES:
        return [f"{path}: its disk is full, {bytes_in_words(free)} are free; free some, or choose another --run-dir"]
    return []


def _elsewhere(run: RunDirectory) -> list[str]:
    where = running_elsewhere(run)
    return [f"{run.path}: {where}; stop it there first"] if where else []


def extensions_directory() -> Path:
    """Where torch builds the C++ extensions of DeepSpeed."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def _locks(root: Path) -> list[str]:
    return _held_locks(root) if has_advisory_locks() else _stale_locks(root)


def has_advisory_locks() -> bool:
    """Whether the builds of this torch hold a lock that the kernel takes from a dead one; older ones left a file."""
    torch = importlib.util.find_spec("torch")
    source = Path(torch.submodule_search_locations[0]) / "utils" / "cpp_extension.py"
    return "FileLock(" in source.read_text()


def _held_locks(root: Path) -> list[str]:
    """Advisory locks that somebody holds who builds nothing: every rank would wait for them, without a word."""
    old = time.time() - HELD_SECONDS
    return [
        f"{lock}: held by {' and '.join(_users(lock)) or 'another machine'}, where no compiler runs, and every rank "
        "would wait for it; end that process"
        for lock in sorted(root.glob("**/lock"))
        if lock.stat().st_mtime < old and _is_locked(lock) and not _is_being_built(lock.parent)
    ]


def _is_locked(lock: Path) -> bool:
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not ours to open, or on a file system without locks: nobody knows
        pass
    return False


def _stale_locks(root: Path) -> list[str]:
    """Lock files of builds that died: every rank would wait for them for ever, without a word."""
    return [
        f"{lock}: left by a build of a torch extension that no longer runs, and every rank would wait for it; "
        f"remove it: rm {lock}"
        for lock in sorted(root.glob("**/lock"))
        if not (_users(lock) or _is_being_built(lock.parent)) and lock.exists()
    ]


def _users(lock: Path) -> list[str]:
    """The processes that have it open, as far as we may see: a build has, from the making of its lock to the end."""
    return [
        f"process {process.pid} ({process.info['name']})"
        for process in psutil.process_iter(["name", "open_files"])
        if any(file.path == str(lock.resolve()) for file in process.info["open_files"] or ())
    ]


def _is_being_built(folder: Path) -> bool:
    """Whether a compiler, or who started it, works in the folder."""
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or ())]
        if any(str(folder) in word for word in words):
            return True
    return False


def _accelerators(plan: dict, shown: int) -> list[str]:
    """Fewer than the ranks, which take one each; torch is asked where the driver shows too few."""
    needed = plan["ranks_per_node"] if plan["accelerators_per_node"] else 0
    if needed <= shown or needed <= (found := _accelerators_of_torch()):
        return []
    if found:
        fix = f"set profile.ranks_per_node={found} and profile.accelerators_per_node={found}"
    else:
        fix = "set profile.accelerators_per_node=0 to compute without"
    return [
        f"profile.accelerators_per_node: {plan['accelerators_per_node']} for {needed} ranks, which take one each, and "
        f"this machine has {found or 'none'}; {fix}, or run where there are {needed}"
    ]


def _accelerators_of_torch() -> int:
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return int(said) if said.isdigit() else 0


def _shared_memory(plan: dict) -> list[str]:
    ranks = plan["ranks_per_node"]
    if not plan["accelerators_per_node"] or ranks == 1 or not SHARED_MEMORY.is_dir():
        return []
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, ranks * SHARED_MEMORY_PER_RANK
    if free >= needed:
        return []
    return [
        f"{SHARED_MEMORY}: {bytes_in_words(free)} are free and {ranks} ranks with accelerators need "
        f"{bytes_in_words(needed)}; in a container raise it, for example docker run --shm-size=8g"
    ]
