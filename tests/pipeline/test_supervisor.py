"""The supervisor: what it asks of its ranks, and what it says where it cannot write."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline import launch
from pipeline.errors import EXIT_FAULT, EXIT_STOPPED
from pipeline.rank import Rank, Stopped, _run
from pipeline.run_directory import RunDirectory, write_json
from pipeline.supervision.judgement import ExitRecord
from pipeline.supervision.ranks import Supervision
from pipeline.supervision.watchdog import Watchdog


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.config_file.touch()
    write_json(run.plan_file, {"stage": "pretrain", "ranks_per_node": 2, "world_size": 2})
    return run


def process(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code])


def supervise(run: RunDirectory) -> int:
    handlers = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
    try:
        return launch.main(str(run.path))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_where_one_rank_stopped_the_others_are_asked_to(run):
    attempt = run.attempt(1).make()
    ranks = {0: process(f"exit({EXIT_STOPPED})"), 1: process("import time; time.sleep(600)")}
    supervision = Supervision(ranks, attempt, Watchdog(attempt, ranks, time.monotonic()))
    supervision.wait()
    assert supervision.codes == {0: EXIT_STOPPED, 1: -signal.SIGTERM} and supervision.hang is None


def test_a_verdict_that_cannot_be_written_is_said(run, monkeypatch, capsys):
    def refuses(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setenv("VIT_ATTEMPT", "1")
    monkeypatch.setattr(launch, "_start_ranks", lambda *_: {0: process("exit(3)")})
    monkeypatch.setattr("pipeline.run_directory.write_json", refuses)
    assert supervise(run) == EXIT_FAULT
    assert capsys.readouterr().err == (
        "rank 0 ended with code 3 in start before the first step, without an exit record; and the verdict could not "
        f"be written: [Errno 28] No space left on device: '{run.path}/attempts/01/exit/verdict.json'\n"
    )


def test_a_rank_that_the_kernel_killed_is_said_to_have_run_out_of_memory(run, monkeypatch):
    monkeypatch.setenv("VIT_ATTEMPT", "1")
    killed = itertools.count()
    monkeypatch.setattr(launch, "killed_for_memory", lambda: next(killed))
    for code, said in (("import os; os.kill(os.getpid(), 9)", True), ("exit(3)", False)):
        monkeypatch.setattr(launch, "_start_ranks", lambda *_, code=code: {0: process(code)})
        assert supervise(run) == EXIT_FAULT
        reason = run.attempt(1).verdict()["reason"]
        assert (
            reason.endswith("; the machine ran out of memory: lower micro_batch_size or profile.loader_workers") == said
        )


def run_out_of_room(me: Rank) -> None:
    me.phase, me.step = "forward", 2
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_is_a_fault_that_names_the_run_and_where_it_was(run):
    me = Rank(run, run.attempt(1).make(), 0, 0, 1)
    assert _run(me, f"{__name__}:run_out_of_room") == (
        EXIT_FAULT,
        f"what belongs to {run.path} could not be written in forward of step 3: No space left on device",
    )


def test_the_last_words_of_ranks_and_supervisor_find_room_on_a_full_disk(small_disk):
    attempt = RunDirectory(small_disk).attempt(1).make()
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "fill").write_bytes(bytes(2 << 20))
    for rank in range(8):
        attempt.write_exit(ExitRecord(rank, EXIT_FAULT, "the disk is full"))
    attempt.write_verdict(EXIT_FAULT, "rank 0: the disk is full")
    assert len(attempt.exit_records()) == 8 and attempt.verdict()["reason"] == "rank 0: the disk is full"


def compile_something(me: Rank) -> None:
    """A stage with a helper process, which is signalled as the rank is."""
    me.phase = "model"
    helper = subprocess.Popen(["sleep", "600"])
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(helper.pid, number)
        os.kill(os.getpid(), number)
    deadline = time.monotonic() + 20
    while not me.stop_requested and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    alive = helper.poll() is None
    helper.kill()
    raise Stopped(f"heard {me.stop_requested}, helper alive {alive}")


def test_a_stop_that_reaches_a_helper_that_a_rank_started_leaves_it_at_work(run):
    attempt = run.attempt(1).make()
    code = f"from pipeline.rank import run_rank; run_rank({str(run.path)!r}, '{__name__}:compile_something')"
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "VIT_ATTEMPT": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | places).returncode == EXIT_STOPPED
    assert attempt.exit_records()[0].reason == "heard True, helper alive True"


def test_a_rank_that_cannot_begin_says_why_in_one_line(tmp_path):
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.pretrain", str(tmp_path)],
        env=os.environ | places,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (2, f"{tmp_path}: not a run directory: it has no config.yaml\n")
