"""Kills, full disks and rivals: nothing half done, nothing left over, the same bytes in the end."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import ingest
from pipeline.shards.check import check_dataset
from tests.pipeline.pictures import class_folders, encoded, files_of, picture

NUM_KILLS = 20
VIT = [sys.executable, "-m", "flows"]


def start(source, directory):
    return subprocess.Popen(
        [*VIT, "ingest", str(source), str(directory), "--set", "samples_per_shard=25", "--set", "workers=2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def processes_of(directory):
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        if str(directory) in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_the_same_bytes_and_nothing_else(tmp_path):
    source = class_folders(tmp_path / "source", per_class=500)
    (source / "ant/copy.jpg").write_bytes((source / "bee/001.jpg").read_bytes())
    (source / "ant/broken.jpg").write_bytes(encoded(picture(1))[:200])
    began = time.monotonic()
    whole = start(source, tmp_path / "whole")
    assert whole.wait(120) == 0, whole.stdout.read()
    seconds = time.monotonic() - began
    moments, killed = random.Random(9), 0
    for kill in range(NUM_KILLS):
        directory = tmp_path / f"killed {kill // 5}"  # so that kills strike the beginning and the end, too
        process = start(source, directory)
        time.sleep(moments.uniform(0.3, 0.95) * seconds)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        gone, alive = psutil.wait_procs(children, timeout=20)
        assert not alive and not processes_of(directory)
    assert killed > NUM_KILLS / 2
    for number in range(NUM_KILLS // 5):
        directory = tmp_path / f"killed {number}"
        again = start(source, directory)
        assert again.wait(120) == 0, again.stdout.read()
        assert files_of(directory) == files_of(tmp_path / "whole")
        assert sorted(path.name for path in directory.rglob("*")) == sorted(
            path.name for path in (tmp_path / "whole").rglob("*")
        )
    assert check_dataset(tmp_path / "killed 0", full=True) == []


def test_a_full_disk_is_one_line_and_publishes_nothing_and_room_goes_on(tmp_path, small_disk):
    source = class_folders(tmp_path / "source", per_class=400)
    process = start(source, small_disk / "dataset")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    (line,) = [line for line in output.splitlines() if "No space left" in line]
    assert str(small_disk) in line and "Traceback" not in output
    assert not (small_disk / "dataset/index.json").exists()
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    again = start(source, small_disk / "dataset")
    assert again.wait(120) == 0, again.stdout.read()
    ingest(str(source), tmp_path / "whole", IngestConfig(samples_per_shard=25))
    assert files_of(small_disk / "dataset") == files_of(tmp_path / "whole")


def test_two_ingestions_into_one_directory_at_once_the_second_is_refused(tmp_path):
    source = class_folders(tmp_path / "source", per_class=400)
    first = start(source, tmp_path / "dataset")
    while not (tmp_path / "dataset/.ingest.jsonl").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(source, tmp_path / "dataset")
    output, _ = second.communicate(timeout=60)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2 and "another ingestion is writing here" in output
    assert first.wait(120) == 0
    assert check_dataset(tmp_path / "dataset", full=True) == []
