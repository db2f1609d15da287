"""What would stop a job minutes after its start is said in one line before it."""

import os
import re
import subprocess
import sys
import time

import pytest

from pipeline.errors import InputError
from pipeline.preparation import preflight
from pipeline.preparation.preflight import require_ready
from pipeline.run_directory import RunDirectory, write_json


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDirectory:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    write_json(run.plan_file, {"ranks_per_node": 2, "accelerators_per_node": 0})
    return run


def problem(run: RunDirectory) -> str:
    with pytest.raises(InputError) as refused:
        require_ready(run)
    (line,) = refused.value.problems
    return line


def test_a_machine_in_order_is_not_complained_about(run):
    require_ready(run)
    assert [path.name for path in run.path.iterdir()] == ["plan.json"]


def test_a_run_directory_that_cannot_be_written_is_refused(run, monkeypatch):
    def refuses(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(preflight.tempfile, "TemporaryFile", refuses)  # root may write where others may not
    assert problem(run) == (
        f"{run.path}: the run directory cannot be written: Read-only file system; choose another --run-dir"
    )


def test_a_full_disk_is_refused(run, monkeypatch):
    monkeypatch.setattr(preflight, "LEAST_FREE_BYTES", 1 << 62)
    assert re.fullmatch(
        f"{run.path}: its disk is full, .* are free; free some, or choose another --run-dir", problem(run)
    )


def test_the_lock_of_a_build_that_died_is_named_with_the_command_that_removes_it(run, tmp_path):
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    require_ready(run)  # it may be that of a build that has just begun
    long_ago = time.time() - 2 * preflight.STALE_SECONDS
    os.utime(lock, (long_ago, long_ago))
    assert problem(run).endswith(f"remove it: rm {lock}")
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=lock.parent, stdin=subprocess.PIPE):
        require_ready(run)  # somebody builds there


def test_too_little_shared_memory_matters_only_between_accelerators(run, monkeypatch):
    monkeypatch.setattr(preflight, "SHARED_MEMORY_PER_RANK", 1 << 62)
    require_ready(run)
    write_json(run.plan_file, {"ranks_per_node": 2, "accelerators_per_node": 2})
    assert "--shm-size=" in problem(run)
