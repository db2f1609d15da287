"""What would stop a job minutes after its start is said in one line before it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import FaultError, InputError
from pipeline.preparation import preflight
from pipeline.preparation.preflight import require_ready
from pipeline.run_directory import RunDirectory, write_json
from pipeline.supervision.liveness import FRESH_SECONDS
from tests.pipeline.checkpoints.prepared import SAVED, prepared_run
from tests.pipeline.conftest import forget_clients


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDirectory:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    prepared = prepared_run(tmp_path / "run")
    prepared.profile_file.write_text("kind: local\n")
    return prepared


def problem(run: RunDirectory, accelerators: int = 0) -> str:
    with pytest.raises(InputError) as refused:
        require_ready(run, accelerators)
    (line,) = refused.value.problems
    return line


def test_a_machine_in_order_is_not_complained_about(run):
    require_ready(run, accelerators=0)
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "plan.json", "profile.yaml"]


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


@pytest.fixture
def lock(run, tmp_path) -> Path:
    """As a build leaves it, long ago."""
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    return lock


def python(code: str, folder: Path) -> subprocess.Popen:
    """A process that has said that it got to the end of `code`, and waits."""
    code += "; print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    return process


def test_the_lock_that_an_older_torch_left_is_named_with_the_command_that_removes_it(run, lock, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "has_advisory_locks", lambda: False)
    assert problem(run).endswith(f"remove it: rm {lock}")
    lock.touch()
    assert problem(run).endswith(f"remove it: rm {lock}")  # however young it is
    with python("pass", lock.parent):
        require_ready(run, accelerators=0)  # somebody builds there
    with python(f"import os; os.open({str(lock.relative_to(tmp_path))!r}, os.O_RDONLY)", tmp_path):
        require_ready(run, accelerators=0)  # somebody is about to


def test_the_lock_file_that_torch_leaves_after_every_build_stops_nobody(run, lock, tmp_path, monkeypatch):
    require_ready(run, accelerators=0)
    monkeypatch.setattr(preflight, "has_advisory_locks", lambda: True)
    require_ready(run, accelerators=0)
    hold = "import fcntl; file = open({!r}); fcntl.flock(file, fcntl.LOCK_EX)"
    with python(hold.format("lock"), lock.parent):
        require_ready(run, accelerators=0)  # somebody builds there
    with python(hold.format(str(lock.relative_to(tmp_path))), tmp_path) as holder:
        assert problem(run).startswith(f"{lock}: held by process {holder.pid} (python")
        lock.touch()
        require_ready(run, accelerators=0)  # it may have just begun


def test_whose_lock_it_is_is_known_of_this_torch():
    from torch.utils import cpp_extension

    assert preflight.has_advisory_locks() == hasattr(cpp_extension, "FileLock")


def test_a_run_that_trains_on_another_machine_is_not_started_a_second_time(run):
    attempt = run.attempt(1).make()
    beat = {"time": time.time(), "started": 0.0, "host": "else", "pid": 7, "ranks": {"0": 7}}
    write_json(attempt.path / "heartbeat" / "node-000", beat)
    assert "attempt 1 runs on else as process 7, heard of 0 s ago; stop it there first" in problem(run)
    write_json(attempt.path / "heartbeat" / "node-000", beat | {"time": time.time() - FRESH_SECONDS - 1})
    require_ready(run, accelerators=0)
    write_json(attempt.path / "heartbeat" / "node-000", beat)
    write_json(attempt.path / "exit" / "verdict.json", {"code": 75, "reason": "stopped"})
    require_ready(run, accelerators=0)


def test_too_little_shared_memory_matters_only_between_accelerators(run, monkeypatch):
    monkeypatch.setattr(preflight, "SHARED_MEMORY_PER_RANK", 1 << 62)
    require_ready(run, accelerators=0)
    write_json(run.plan_file, run.plan() | {"ranks_per_node": 2, "accelerators_per_node": 2})
    assert "--shm-size=" in problem(run, accelerators=2)


def test_accelerators_that_are_not_there_are_refused_before_a_rank_dies_of_it(run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_json(run.plan_file, run.plan() | {"ranks_per_node": 2, "accelerators_per_node": 2})
    assert problem(run) == (
        "profile.accelerators_per_node: 2 for 2 ranks, which take one each, and this machine has none; "
        "set profile.accelerators_per_node=0 to compute without, or run where there are 2"
    )
    require_ready(run, accelerators=2)
    run.profile_file.write_text("kind: slurm\n")
    require_ready(run, accelerators=0)  # this machine is not where it will run


def test_torch_has_the_last_word_on_what_accelerators_there_are(run, monkeypatch):
    monkeypatch.setattr(preflight, "_accelerators_of_torch", lambda: 2)  # as where the driver has no /dev/nvidia0
    write_json(run.plan_file, run.plan() | {"ranks_per_node": 2, "accelerators_per_node": 2})
    require_ready(run, accelerators=0)
    write_json(run.plan_file, run.plan() | {"ranks_per_node": 4, "accelerators_per_node": 2})
    assert "and this machine has 2; set profile.ranks_per_node=2 and" in problem(run, accelerators=2)


def test_a_mirror_is_written_and_read_before_the_job(run, tmp_path):
    mirrored = prepared_run(run.path, f"checkpoint.mirror=file://{tmp_path / 'mirror'}")
    require_ready(mirrored, 0)
    assert (tmp_path / "mirror" / "run" / "run.json").is_file()
    other = prepared_run(tmp_path / "b" / "run", f"checkpoint.mirror=file://{tmp_path / 'mirror'}", "seed=7")
    other.profile_file.write_text("kind: local\n")
    assert problem(other).startswith(f"checkpoint.mirror: file://{tmp_path}/mirror/run: belongs to another run than ")
    (tmp_path / "file").touch()
    in_the_way = prepared_run(run.path, f"checkpoint.mirror=file://{tmp_path / 'file'}")
    assert f"file://{tmp_path}/file/run: cannot be written (" in problem(in_the_way)


def test_a_bucket_that_is_not_there_is_refused_and_a_server_that_is_down_only_before_the_first_checkpoint(
    run, s3_port, monkeypatch
):
    settings = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    monkeypatch.setenv("VIT_STORAGE_PATIENCE_SECONDS", "0.5")
    forget_clients()
    mirrored = prepared_run(run.path, "checkpoint.mirror=s3://nowhere-at-all/runs")
    assert problem(mirrored).endswith("is there such a bucket or folder?")
    forget_clients()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(FaultError, match="checkpoint.mirror: s3://nowhere-at-all/runs"):
        require_ready(mirrored, 0)
    shutil.copytree(SAVED, mirrored.checkpoints / SAVED.name)
    require_ready(mirrored, 0)
    forget_clients()
