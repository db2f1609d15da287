"""The watchdog: which rank keeps the others waiting, after how long, and what its stack says."""

import faulthandler
import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.progress import Position, Progress, read_position
from pipeline.run_directory import RunDirectory
from pipeline.supervision.watchdog import Watchdog, hang_seconds, killed_for_memory, long_hang_seconds, main_frames


@pytest.fixture
def attempt(tmp_path):
    return RunDirectory(tmp_path).attempt(1).make()


@pytest.fixture
def ranks(attempt):
    """The progress of two ranks, which both have made their first step."""
    both = [Progress(attempt.progress(rank)) for rank in range(2)]
    for progress in both:
        progress.step = 0
        progress.enter("data")
    return both


def watching(attempt, ranks) -> Watchdog:
    watchdog = Watchdog(attempt, range(2), 0.0)
    watchdog.look(0.0)
    for progress in ranks:
        progress.step = 1
        progress.enter("data")
    watchdog.look(1.0)
    return watchdog


def is_hung(watchdog: Watchdog, seconds: float) -> bool:
    for now in range(2, int(seconds) + 1):  # it looks often: a gap would be its own pause
        watchdog.look(float(now))
    return watchdog.hung((0, 1), seconds)


def test_progress_is_read_as_it_was_written_and_only_known_phases_are_watched(tmp_path):
    progress = Progress(tmp_path / "rank")
    assert read_position(tmp_path / "rank") == Position(0, -1, "start")
    progress.enter("forward")
    progress.step = 6
    assert read_position(tmp_path / "rank") == Position(1, 6, "forward", 6)
    progress.enter("evaluate one of many")
    assert progress.phase == "evaluate one of many" and read_position(tmp_path / "rank").phase == ""
    assert read_position(tmp_path / "none") is None


def test_the_rank_behind_all_others_hangs_when_its_time_is_over(attempt, ranks):
    watchdog = watching(attempt, ranks)
    ranks[0].enter("forward")  # it went on, and now waits for rank 1
    assert not is_hung(watchdog, hang_seconds() - 5) and is_hung(watchdog, hang_seconds() + 5)


def test_a_slow_peer_that_moves_is_no_hang(attempt, ranks):
    watchdog = watching(attempt, ranks)
    for now in range(2, int(3 * hang_seconds())):
        if now % 60 == 0:
            ranks[1].enter("data")
        watchdog.look(float(now))
        assert ranks[1].step == 1 and not watchdog.hung((1,), float(now))


@pytest.mark.parametrize("phase", ["checkpoint", "start"])
def test_saving_and_starting_may_take_longer(phase, attempt, ranks):
    watchdog = watching(attempt, ranks)
    for progress in ranks:
        progress.enter(phase)
    assert not is_hung(watchdog, hang_seconds() + 100) and is_hung(watchdog, long_hang_seconds() + 5)


def test_the_first_step_may_compile_for_longer(attempt, ranks):
    watchdog = Watchdog(attempt, range(2), 0.0)
    watchdog.look(1.0)
    assert not is_hung(watchdog, hang_seconds() + 100) and is_hung(watchdog, long_hang_seconds() + 5)


def test_a_supervisor_that_did_not_run_accuses_nobody(attempt, ranks):
    watchdog = watching(attempt, ranks)
    watchdog.look(10 * hang_seconds())
    assert not watchdog.hung((0, 1), 10 * hang_seconds())


def test_the_stack_of_the_main_thread_is_read_innermost_first(tmp_path):
    with open(tmp_path / "stacks", "w") as file:
        faulthandler.register(signal.SIGUSR2, file, all_threads=True)
        _wait_to_be_asked()
        faulthandler.unregister(signal.SIGUSR2)
    frames = main_frames(tmp_path / "stacks")
    assert frames[0].endswith("in _wait_to_be_asked") and "test_watchdog.py:" in frames[0]
    assert main_frames(tmp_path / "none") == []


def _wait_to_be_asked() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/vmstat").exists(), reason="needs Linux")
def test_processes_killed_for_memory_are_counted_in_a_container_and_outside(tmp_path, monkeypatch):
    assert killed_for_memory() >= 0
    outside = tmp_path / "vmstat"
    outside.write_text("pgfault 12\noom_kill 3\n")
    monkeypatch.setattr(
        "pipeline.supervision.watchdog.Path", lambda name: outside if name == "/proc/vmstat" else tmp_path / "none"
    )
    assert killed_for_memory() == 3
