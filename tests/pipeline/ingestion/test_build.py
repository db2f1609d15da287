"""Folders become datasets: everything accounted for, the same bytes however they were made, nothing half done."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion import build
from pipeline.ingestion.build import ingest
from pipeline.ingestion.making import IngestError
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.pictures import class_folders, encoded, files_of, picture, small_dataset, write_pictures


def rejected_of(directory):
    return [json.loads(line) for line in (directory / "rejected.jsonl").read_text().splitlines()]


def records_of(directory):
    index = read_index(directory)
    readers = [ShardReader(index, split) for split in index.splits]
    return [
        reader.record(shard, n)
        for reader in readers
        for shard, size in enumerate(reader.shard_sizes)
        for n in range(size)
    ]


def test_class_folders_become_labelled_samples_and_every_one_is_there(tmp_path):
    report = small_dataset(tmp_path)
    index = read_index(report.directory, check_sizes=True)
    assert index.classes == ("ant", "bee") and index.labelled
    records = records_of(report.directory)
    assert sorted(record["source"] for record in records) == sorted(
        str(path.relative_to(tmp_path / "source")) for path in (tmp_path / "source").rglob("*.*")
    )
    assert all(
        record["class"] == record["source"].split("/")[0] == index.classes[record["label"]] for record in records
    )
    assert sum(report.samples.values()) == 40 and report.rejected == {}
    assert index.provenance["made_from"]["source"] == str(tmp_path / "source")
    assert check_dataset(report.directory, full=True) == []


def test_statistics_are_those_of_the_training_pixels(tmp_path):
    small_dataset(tmp_path, split_fractions={"train": 1.0})
    import io

    from PIL import Image

    index = read_index(tmp_path / "dataset")
    reader = ShardReader(index, "train")
    images = [reader.read(shard, n).image for shard, size in enumerate(reader.shard_sizes) for n in range(size)]
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).reshape(-1, 3) / 255 for image in images]
    )
    assert index.statistics.mean == pytest.approx(tuple(pixels.mean((0, 1))))
    assert index.statistics.std == pytest.approx(tuple(pixels.std((0, 1))))
    assert index.statistics.mean_encoded_bytes == np.mean([len(image) for image in images])
    assert index.statistics.width == (24, 24, 24)


def test_samples_of_a_class_sorted_source_are_shuffled(tmp_path):
    small_dataset(tmp_path, per_class=60, samples_per_shard=20, split_fractions={"train": 1.0})
    index = read_index(tmp_path / "dataset")
    reader = ShardReader(index, "train")
    for shard, size in enumerate(reader.shard_sizes):
        assert 3 <= sum(reader.read(shard, n).label for n in range(size)) <= 17


def test_another_run_another_place_and_any_number_of_workers_give_the_same_bytes(tmp_path):
    source = class_folders(tmp_path / "source")
    reports = {}
    for workers in (1, 2):
        config = IngestConfig(samples_per_shard=7, workers=workers)
        reports[workers] = ingest(str(source), tmp_path / f"by{workers}", config)
    assert files_of(tmp_path / "by1") == files_of(tmp_path / "by2")
    assert reports[1].shards_written == reports[2].shards_written > 4


def test_a_rerun_writes_no_shard_and_changes_no_byte(tmp_path):
    first = small_dataset(tmp_path)
    before = files_of(first.directory)
    times = {path.name: path.stat().st_mtime_ns for path in first.directory.glob("*.tar")}
    again = ingest(str(tmp_path / "source"), first.directory, IngestConfig(samples_per_shard=7))
    assert (again.shards_written, again.shards_kept) == (0, first.shards_written)
    assert files_of(first.directory) == before
    assert {path.name: path.stat().st_mtime_ns for path in first.directory.glob("*.tar")} == times


def test_a_changed_file_rewrites_one_shard_and_a_removed_one_leaves_nothing_behind(tmp_path):
    first = small_dataset(tmp_path, split_fractions={"train": 1.0})
    config = IngestConfig(samples_per_shard=7, split_fractions={"train": 1.0})
    (tmp_path / "source/ant/001.jpg").write_bytes(encoded(picture(999)))
    assert ingest(str(tmp_path / "source"), first.directory, config).shards_written == 1
    for path in (tmp_path / "source/bee").iterdir():
        path.unlink()
    report = ingest(str(tmp_path / "source"), first.directory, config)
    assert report.samples == {"train": 20} and len(list(first.directory.glob("*.tar"))) == 3
    assert len(list(first.directory.glob("*.idx"))) == 3
    assert check_dataset(first.directory, full=True) == []


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_rerun_mends_a_damaged_shard(tmp_path, damage):
    directory = small_dataset(tmp_path).directory
    before = files_of(directory)
    path = directory / "train-000001.tar"
    os.truncate(path, 5000) if damage == "cut" else path.unlink()
    assert ingest(str(tmp_path / "source"), directory, IngestConfig(samples_per_shard=7)).shards_written == 1
    assert files_of(directory) == before


KILLED = """
import sys
from pathlib import Path
from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import ingest
if __name__ == "__main__":
    ingest(sys.argv[1], Path(sys.argv[2]), IngestConfig(samples_per_shard=20, workers=int(sys.argv[3])))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_an_ingestion_killed_at_any_time_goes_on_to_the_same_bytes(tmp_path, workers):
    source = class_folders(tmp_path / "source", per_class=400)
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    directory = tmp_path / "killed"
    finished = 0
    for num_shards in (1, 12, 25):
        process = subprocess.Popen(
            [sys.executable, script, str(source), str(directory), str(workers)],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        deadline = time.monotonic() + 60
        while (
            process.poll() is None and len(list(directory.glob("*.tar"))) < num_shards and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        finished += process.wait() == 0
        assert finished or not (directory / "index.json").exists()
    report = ingest(str(source), directory, IngestConfig(samples_per_shard=20))
    assert finished or report.shards_kept > 0
    ingest(str(source), tmp_path / "whole", IngestConfig(samples_per_shard=20))
    assert files_of(directory) == files_of(tmp_path / "whole")


def test_torn_journal_lines_and_temporary_files_of_a_killed_run_do_not_matter(tmp_path):
    directory = small_dataset(tmp_path).directory
    before = files_of(directory)
    journal = directory / ".ingest.jsonl"
    for size in (journal.stat().st_size - 5, 10, 0):
        os.truncate(journal, size)
        (directory / ".tmp-123-train-000000.tar").write_bytes(b"half")
        ingest(str(tmp_path / "source"), directory, IngestConfig(samples_per_shard=7))
        assert files_of(directory) == before
        assert not list(directory.glob(".tmp-*"))


def test_two_ingestions_do_not_write_the_same_directory(tmp_path):
    import fcntl

    directory = small_dataset(tmp_path).directory
    with open(directory / ".ingest.jsonl", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another ingestion"):
            ingest(str(tmp_path / "source"), directory, IngestConfig(samples_per_shard=7))


def test_a_dataset_that_another_ingestion_began_meanwhile_is_left_alone(tmp_path, monkeypatch):
    other = class_folders(tmp_path / "other")
    source, directory = class_folders(tmp_path / "source"), tmp_path / "dataset"

    def meanwhile(*_):
        monkeypatch.undo()
        ingest(str(other), directory, IngestConfig())
        return ()

    monkeypatch.setattr(build, "read_others", meanwhile)
    monkeypatch.setattr(build, "check_destination", lambda *_: None)  # it came after that
    with pytest.raises(InputError, match="another dataset: source is .*other"):
        ingest(str(source), directory, IngestConfig())
    assert read_index(directory).provenance["made_from"]["source"] == str(other)


def test_a_damaged_line_of_the_journal_costs_its_shard_and_no_more(tmp_path):
    directory = small_dataset(tmp_path).directory
    before, journal = files_of(directory), directory / ".ingest.jsonl"
    lines = journal.read_bytes().splitlines()
    summary = json.loads(lines[1])["summary"]
    damaged = [{"key": "x"}, {"key": "x", "summary": {"name": "a"}}, {"key": "x", "summary": summary | {"totals": 1}}]
    damaged = [b"\xff", b"[1]", *(json.dumps(line).encode() for line in damaged)]
    journal.write_bytes(b"\n".join([lines[0], *damaged, *lines[2:], b""]))
    report = ingest(str(tmp_path / "source"), directory, IngestConfig(samples_per_shard=7))
    assert (report.shards_written, files_of(directory)) == (1, before)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match=f"{tmp_path}/dataset: its file system has no locks .*name a directory"):
        small_dataset(tmp_path)


@pytest.mark.parametrize("source", [
    "https://me:hunter2@server/ants.zip", "https://hunter2@server/ants/{0..3}.tar", "https://server/ants?key=hunter2",
    "https://server/get?key=hunter2&as=ants.zip",
])  # fmt: skip
def test_a_secret_in_the_source_is_not_shown_whatever_lies_at_the_destination(tmp_path, source):
    directory = small_dataset(tmp_path).directory
    for destination in (directory, "https://me:hunter2@server/dataset"):
        with pytest.raises(InputError, match="credentials") as caught:
            ingest(source, destination, IngestConfig())
        assert "hunter2" not in str(caught.value)
    with pytest.raises(InputError, match="credentials") as caught:
        ingest(str(tmp_path / "source"), "https://me:hunter2@server/dataset", IngestConfig())
    assert "hunter2" not in str(caught.value)


def test_every_file_is_taken_or_rejected_with_a_reason(tmp_path):
    source = class_folders(tmp_path / "source")
    (source / "README.md").write_text("pictures")
    (source / "ant/Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 10)
    (source / "ant/empty.jpg").write_bytes(b"")
    (source / "ant/text.jpg").write_text("not a picture")
    (source / "ant/cut.jpg").write_bytes(encoded(picture(1))[:-100])
    (source / "bee/no_extension").write_bytes(encoded(picture(1)))
    (source / "bee/phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    os.symlink("/nowhere", source / "bee/broken_link.jpg")
    os.symlink(source, source / "bee/loop")
    os.mkfifo(source / "bee/pipe.jpg")
    report = ingest(str(source), tmp_path / "dataset", IngestConfig(max_rejected_fraction=0.5))
    reasons = {entry["path"]: entry["reason"] for entry in rejected_of(tmp_path / "dataset")}
    assert reasons == {
        "README.md": "not_an_image",
        "ant/Thumbs.db": "not_an_image",
        "ant/empty.jpg": "empty_file",
        "ant/text.jpg": "unknown_format",
        "ant/cut.jpg": "broken_image",
        "bee/phone.heic": "unknown_format",
        "bee/broken_link.jpg": "unreadable_file",
        "bee/loop": "repeated_link",
        "bee/pipe.jpg": "unreadable_file",
    }
    assert sum(report.samples.values()) == 41  # with the one that has no extension


def test_too_many_rejected_images_stop_before_anything_is_published(tmp_path):
    source = class_folders(tmp_path / "source")
    (source / "ant/text.jpg").write_text("not a picture")
    (source / "README.md").write_text("does not count")
    with pytest.raises(IngestError, match="2.44% of the images were rejected .1 unknown_format."):
        ingest(str(source), tmp_path / "dataset", IngestConfig(max_rejected_fraction=0.02))
    assert not (tmp_path / "dataset/index.json").exists()
    assert "ant/text.jpg" in (tmp_path / "dataset/rejected.jsonl").read_text()
    report = ingest(str(source), tmp_path / "dataset", IngestConfig(max_rejected_fraction=0.03))
    assert report.shards_kept > 0 and report.rejected == {"not_an_image": 1, "unknown_format": 1}


def test_a_source_of_broken_images_alone_is_an_error(tmp_path):
    write_pictures(tmp_path / "source", ["a.jpg"])
    (tmp_path / "source/a.jpg").write_text("not a picture")
    with pytest.raises(IngestError, match="not one image"):
        ingest(str(tmp_path / "source"), tmp_path / "dataset", IngestConfig(max_rejected_fraction=1.0))


HOSTILE = [
    "ant/dots.in.the.name.v2.jpg",
    "ant/dots.in.the.name.v3.jpg",
    "ant/spaces & (brackets).jpg",
    "ant/n\u00e4me-\u6771\u4eac-\U0001f600.jpg",
    "ant/.hidden.jpg",
    "ant/-rf.jpg",
    "ant/new\nline.jpg",
    "bee/" + "x" * 240 + ".jpg",
    "bee/" + "x" * 239 + "y.jpg",
    "bee/a.jpg",
    "bee/a.jpeg",
    "bee/a/a.jpg",
    "bee/\udcff\udcfe.jpg",
]


def test_hostile_names_become_safe_unique_keys_and_stay_in_the_record(tmp_path):
    source = write_pictures(tmp_path / "source", HOSTILE)
    ingest(str(source), tmp_path / "dataset", IngestConfig(split_fractions={"train": 1.0}))
    assert sorted(record["source"] for record in records_of(tmp_path / "dataset")) == sorted(HOSTILE)
    with tarfile.open(tmp_path / "dataset/train-000000.tar") as tar:
        names = tar.getnames()
    keys = {name.split(".")[0] for name in names}
    assert len(keys) == len(HOSTILE) and len(names) == 2 * len(HOSTILE)
    assert all(
        len(name) <= 100 and name.isascii() and "/" not in name and name[0].isalnum() or name[0] == "_"
        for name in names
    )


@pytest.mark.parametrize("make, words", [
    (lambda path: None, "no such folder"),
    (lambda path: path.mkdir(), "is empty"),
    (lambda path: (path.mkdir(), (path / "a.txt").write_text("x")), "no images among its 1 files"),
    (lambda path: path.write_text("x"), "a file; a source is"),
])  # fmt: skip
def test_a_source_without_images_is_an_input_error_and_nothing_is_written(tmp_path, make, words):
    make(tmp_path / "source")
    with pytest.raises(InputError, match=words):
        ingest(str(tmp_path / "source"), tmp_path / "dataset", IngestConfig())
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("source, words", [("sklearn:faces", "sklearn:digits"), ("memory://no/a.zip", "no such zip")])
def test_a_source_that_is_not_supported_says_what_is(tmp_path, source, words):
    with pytest.raises(InputError, match=words):
        ingest(source, tmp_path / "dataset", IngestConfig())


def test_a_destination_with_something_else_is_refused_and_left_alone(tmp_path):
    directory = small_dataset(tmp_path).directory
    before = files_of(directory)
    with pytest.raises(InputError, match="another dataset: seed is 0 there, 1 now"):
        ingest(str(tmp_path / "source"), directory, IngestConfig(samples_per_shard=7, seed=1))
    with pytest.raises(InputError, match="another dataset: .*source is"):
        ingest("sklearn:digits", directory, IngestConfig(samples_per_shard=7))
    assert files_of(directory) == before
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/thesis.txt").write_text("x")
    for destination, words in [
        ("documents", "holds other files, such as thesis.txt"),
        ("source/dataset", "lies in the source"),
        ("source", "lies in"),
    ]:
        with pytest.raises(InputError, match=words):
            ingest(str(tmp_path / "source"), tmp_path / destination, IngestConfig())
    assert not (tmp_path / "source/dataset").exists()


def test_the_fingerprint_is_of_content_and_labels_alone(tmp_path):
    first = small_dataset(tmp_path, split_fractions={"train": 1.0})
    other = ingest(
        str(tmp_path / "source"),
        tmp_path / "other",
        IngestConfig(samples_per_shard=11, seed=5, split_fractions={"train": 1.0}),
    )
    assert first.fingerprint == other.fingerprint
    (tmp_path / "source/ant/001.jpg").rename(tmp_path / "source/bee/moved.jpg")
    relabelled = ingest(str(tmp_path / "source"), tmp_path / "third", IngestConfig(split_fractions={"train": 1.0}))
    assert relabelled.fingerprint != first.fingerprint


def test_progress_counts_every_file_up_to_the_last(tmp_path):
    source = class_folders(tmp_path / "source")
    (source / "README.md").write_text("x")
    calls = []
    ingest(
        str(source),
        tmp_path / "dataset",
        IngestConfig(samples_per_shard=7),
        progress=lambda *counts: calls.append(counts),
    )
    assert calls == sorted(calls) and calls[0] == (1, 41, 0) and calls[-1] == (41, 41, 0)


def test_the_digits_are_real_images_with_a_fixed_split(tmp_path):
    report = ingest("sklearn:digits", tmp_path / "digits", IngestConfig())
    assert report.samples == {"train": 1442, "test": 355} and report.num_classes == 10
    from sklearn.datasets import load_digits

    digits = load_digits()
    for record in records_of(tmp_path / "digits"):
        assert record["label"] == digits.target[int(record["source"].split("/")[2].removesuffix(".png"))]


@pytest.mark.data
@pytest.mark.skipif("VIT_TEST_DATA" not in os.environ, reason="VIT_TEST_DATA is not set")
def test_odd_images_are_all_accounted_for(tmp_path):
    import zipfile
    from pathlib import Path

    with zipfile.ZipFile(Path(os.environ["VIT_TEST_DATA"]) / "odd_images/odd_images.zip") as archive:
        archive.extractall(tmp_path / "source")
        files = {info.filename for info in archive.infolist() if not info.is_dir()}
    for channels in ("rgb", "keep"):
        directory = tmp_path / channels
        ingest(str(tmp_path / "source"), directory, IngestConfig(max_rejected_fraction=1.0, channels=channels))
        taken = [record["source"] for record in records_of(directory)]
        left = [entry["path"] for entry in rejected_of(directory)]
        assert len(taken) + len(left) == len(files) and {*taken, *left} == files
        assert len(taken) > 110
        assert check_dataset(directory, full=True) == []
