"""A file that crashes its decoder, hangs it or eats memory is rejected, and everything else is taken."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.errors import FaultError
from pipeline.ingestion import making
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.build import ingest
from pipeline.ingestion.isolation import Limits, TooManyFaults, WorkerLost, held, in_isolation
from pipeline.ingestion.making import IngestError
from pipeline.ingestion.plan import plan_ingest
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.shards.decoding import ImageFault
from tests.pipeline.ingestion.test_build import rejected_of
from tests.pipeline.pictures import class_folders, encoded, files_of, picture, write_tar

LIMITS = Limits(60, 1 << 30)
MEMORY = Limits(60, 300 << 20)
MANY = 100


@dataclass(frozen=True)
class Deed:
    """A task over four files: what `deed` names is done while the file of number 2 is decoded."""

    deed: str
    marks: Path  # one line is added whenever a file is decoded

    def where(self, number: int) -> str:
        return f"{self.marks}#{number}"

    def run(self) -> list[str]:
        told = []
        for number in range(4):
            try:
                with held(number) as start_clock:
                    start_clock()
                    with open(self.marks, "a") as marks:
                        marks.write(f"{number}\n")
                    if number == 2:
                        DEEDS[self.deed](self)
                    told.append("taken")
            except ImageFault as fault:
                told.append(fault.reason)
        return told


def _touch_memory(task):
    blocks = []
    while True:
        blocks.append(b"x" * (16 << 20))
        time.sleep(0.005)


def _die_outside_once(task):
    if task.marks.read_text().count("2\n") == 1:
        os.kill(os.getpid(), signal.SIGKILL)


DEEDS = {
    "nothing": lambda task: None,
    "segfault": lambda task: ctypes.string_at(0),
    "abort": lambda task: os.abort(),
    "exit": lambda task: os._exit(0),
    "hang": lambda task: ctypes.PyDLL(None).pause(),  # in C, and it keeps the interpreter's lock
    "eat": _touch_memory,
    "ask": lambda task: bytearray(1 << 40),
    "killed once": _die_outside_once,
    "killed": lambda task: os.kill(os.getpid(), signal.SIGKILL),
}


def outcomes(tmp_path, *deeds, workers=1, limits=LIMITS, allowed=MANY):
    tasks = [Deed(deed, tmp_path / f"{number}.txt") for number, deed in enumerate(deeds)]
    return list(in_isolation(Deed.run, tasks, workers, limits, allowed))


@pytest.mark.parametrize("deed, reason, limits", [
    ("segfault", "decoder_crashed", LIMITS),
    ("abort", "decoder_crashed", LIMITS),
    ("exit", "decoder_crashed", LIMITS),
    ("hang", "too_slow", Limits(0.5, 1 << 30)),
    ("eat", "too_much_memory", MEMORY),
    ("ask", "too_much_memory", MEMORY),
])  # fmt: skip
def test_a_file_that_ends_its_process_is_told_from_the_others(tmp_path, deed, reason, limits):
    assert outcomes(tmp_path, deed, limits=limits) == [["taken", "taken", reason, "taken"]]
    assert (tmp_path / "0.txt").read_text().count("2\n") == 1  # and it is not tried again


def test_other_tasks_go_on_beside_one_that_ends_its_processes(tmp_path):
    told = outcomes(tmp_path, "nothing", "segfault", "nothing", "abort", "nothing", workers=2)
    assert sorted(told) == sorted([["taken"] * 4] * 3 + [["taken", "taken", "decoder_crashed", "taken"]] * 2)


def test_a_process_killed_from_outside_gets_a_second_chance_and_no_file_is_blamed(tmp_path):
    assert outcomes(tmp_path, "killed once") == [["taken"] * 4]
    with pytest.raises(WorkerLost, match="killed by SIGKILL, twice"):
        outcomes(tmp_path, "nothing", "killed")


def test_a_decoder_that_crashes_on_everything_does_not_go_through_all_of_it(tmp_path):
    with pytest.raises(TooManyFaults, match="2 decoder_crashed; the last: .*SIGSEGV"):
        outcomes(tmp_path, "segfault", "segfault", "segfault", allowed=1)


def _raise(task):
    raise OSError(28, "No space left on device", str(task))


def test_what_a_task_raises_comes_back_and_no_child_is_left(tmp_path):
    before = psutil.Process().children()  # servers of other tests
    with pytest.raises(OSError, match="No space left on device"):
        list(in_isolation(_raise, [tmp_path, tmp_path, tmp_path], 2, LIMITS, MANY))
    assert set(psutil.Process().children()) <= set(before)


PARENT = """
import sys, time
from pathlib import Path
from pipeline.ingestion.isolation import Limits, in_isolation
from tests.pipeline.ingestion.test_isolation import Deed
list(in_isolation(Deed.run, [Deed("hang", Path(sys.argv[1]))], 1, Limits(1000, 1 << 30), 9))
"""


def test_a_hanging_child_dies_with_a_parent_that_was_killed(tmp_path):
    marks = tmp_path / "marks"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(marks)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while not (marks.exists() and "2\n" in marks.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@dataclass(frozen=True)
class DeadlySource(FolderSource):
    """A folder whose files named `deadly` crash whoever reads them; reading stands for decoding here, since no decoder
    is known that crashes."""

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        if "deadly" in path and num_bytes < 0:
            ctypes.string_at(0)
        return super().read(path, num_bytes)


def test_an_ingestion_survives_crashes_and_its_dataset_is_as_without_these_files(tmp_path, monkeypatch):
    source = class_folders(tmp_path / "source")
    config = IngestConfig(samples_per_shard=20, split_fractions={"train": 1.0}, max_rejected_fraction=0.1)
    for name in ("ant/deadly.jpg", "bee/deadly.jpg"):
        (source / name).write_bytes(encoded(picture(77)))
    monkeypatch.setattr("pipeline.ingestion.opening.open_source", lambda source: DeadlySource(Path(source)))
    report = ingest(str(source), tmp_path / "dataset", config)
    assert report.rejected == {"decoder_crashed": 2} and report.samples == {"train": 40}
    rejected = rejected_of(tmp_path / "dataset")
    assert [entry["path"] for entry in rejected] == ["ant/deadly.jpg", "bee/deadly.jpg"]
    assert rejected[0]["detail"] == "the process that decoded it was killed by SIGSEGV"
    before = files_of(tmp_path / "dataset")
    assert not list((tmp_path / "dataset").glob(".tmp-*"))
    started = time.monotonic()
    assert ingest(str(source), tmp_path / "dataset", config).shards_written == 0
    assert files_of(tmp_path / "dataset") == before and time.monotonic() - started < 2
    again = ingest(str(source), tmp_path / "again", config.model_copy(update={"workers": 2}))
    assert again.fingerprint == report.fingerprint and files_of(tmp_path / "again").keys() == before.keys()
    with pytest.raises(IngestError, match=r"2.38% of the images were rejected \(1 decoder_crashed\)"):
        ingest(str(source), tmp_path / "strict", config.model_copy(update={"max_rejected_fraction": 0.01}))
    assert not (tmp_path / "strict/index.json").exists()


def test_a_decoder_that_crashes_on_every_image_is_one_line(tmp_path, monkeypatch):
    source = class_folders(tmp_path / "deadly", per_class=4)
    monkeypatch.setattr("pipeline.ingestion.opening.open_source", lambda name: DeadlySource(source.parent))
    monkeypatch.setattr(making, "FAULTS_BEYOND_BUDGET", 1)
    with pytest.raises(IngestError, match="images that end the process which decodes them .2 decoder_crashed"):
        ingest(str(source), tmp_path / "dataset", IngestConfig())


@pytest.mark.parametrize("config, memory, reason, detail", [
    ({"format": "webp", "max_image_seconds": 2}, 4 << 30, "too_slow",
     "not decoded within 2 seconds (max_image_seconds)"),
    ({}, 200 << 20, "too_much_memory", "decoding it takes more memory than one image may"),
])  # fmt: skip
def test_a_real_image_beyond_the_limits_is_rejected_and_the_rest_taken(
    tmp_path, monkeypatch, config, memory, reason, detail
):
    source = class_folders(tmp_path / "source", per_class=3)
    Image.new("1", (9_400, 9_400)).save(source / "ant/large.png")
    monkeypatch.setattr(making, "memory_limit", lambda max_pixels: memory)
    report = ingest(str(source), tmp_path / "dataset", IngestConfig(max_rejected_fraction=0.5, **config))
    assert report.rejected == {reason: 1} and sum(report.samples.values()) == 6
    (entry,) = rejected_of(tmp_path / "dataset")
    assert (entry["path"], entry["detail"]) == ("ant/large.png", detail)


@dataclass(frozen=True)
class KilledSource(FolderSource):
    """A folder at whose file `killed.jpg` someone kills the reader, as the kernel does when memory runs out."""

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        if path.endswith("killed.jpg") and num_bytes < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(path, num_bytes)


def test_a_worker_that_is_killed_again_and_again_is_one_line_and_no_file_is_blamed(tmp_path, monkeypatch):
    source = class_folders(tmp_path / "source", per_class=3)
    (source / "ant/killed.jpg").write_bytes(encoded(picture(1)))
    monkeypatch.setattr("pipeline.ingestion.opening.open_source", lambda name: KilledSource(source))
    with pytest.raises(IngestError, match="killed by SIGKILL, twice .* workers=1") as caught:
        ingest(str(source), tmp_path / "dataset", IngestConfig())
    assert "\n" not in str(caught.value)
    left = {path.name for path in (tmp_path / "dataset").iterdir()}
    assert "index.json" not in left and not any(name.startswith(".tmp-") for name in left)


@dataclass(frozen=True)
class DeadSource(FolderSource):
    """A folder whose file `dead.jpg` lies on a mount that does not answer, until `there` is."""

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        while path.endswith("dead.jpg") and num_bytes < 0 and not self.root.with_name("there").exists():
            ctypes.PyDLL(None).pause()  # as in a read that does not come back
        return super().read(path, num_bytes)


def test_a_file_that_cannot_be_read_in_time_ends_the_ingestion_and_the_next_goes_on(tmp_path, monkeypatch):
    source = class_folders(tmp_path / "source", per_class=6)
    (source / "ant/dead.jpg").write_bytes(encoded(picture(1)))
    monkeypatch.setattr("pipeline.ingestion.opening.open_source", lambda name: DeadSource(source))
    config = IngestConfig(max_read_seconds=1, samples_per_shard=2)
    with pytest.raises(FaultError, match=r"ant/dead.jpg: not read within 1 seconds \(max_read_seconds\)") as caught:
        ingest(str(source), tmp_path / "dataset", config)
    assert "\n" not in str(caught.value) and "shards are finished and stay" in str(caught.value)
    (tmp_path / "there").touch()
    report = ingest(str(source), tmp_path / "dataset", IngestConfig(max_read_seconds=9, samples_per_shard=2))
    assert sum(report.samples.values()) == 13 and not report.rejected


def test_a_tar_that_cannot_be_read_is_named_without_reading_it(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("one.jpg", encoded(picture(1)))])
    plan = plan_ingest(str(path), IngestConfig(), Scratch(tmp_path / "dataset"))
    path.unlink()
    assert plan.jobs[0].where(0) == str(path)


def test_tars_are_adopted_in_isolation_too(tmp_path, monkeypatch):
    large = encoded(Image.new("1", (9_400, 9_400)), "PNG")
    members = [("one.jpg", encoded(picture(1))), ("two.png", large), ("three.jpg", encoded(picture(1)))]
    path = write_tar(tmp_path / "a.tar", members)
    monkeypatch.setattr(making, "memory_limit", lambda max_pixels: 200 << 20)
    report = ingest(str(path), tmp_path / "dataset", IngestConfig(max_rejected_fraction=0.5))
    assert report.rejected == {"too_much_memory": 1} and sum(report.samples.values()) == 2
