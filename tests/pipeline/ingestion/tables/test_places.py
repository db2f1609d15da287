"""Tables inside archives and behind URLs give what they give in a folder; nothing of them stays behind."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion import plan
from pipeline.ingestion.archives.unpacking import Scratch, remove_unpacked
from pipeline.ingestion.build import ingest
from pipeline.ingestion.opening import list_source
from pipeline.ingestion.tables import source as tables
from pipeline.shards.index import read_index
from tests.pipeline.ingestion.tables.test_arrow import contents, saved, write_parquet
from tests.pipeline.ingestion.tables.test_cifar import write_cifar10
from tests.pipeline.ingestion.tables.test_idx import write_set
from tests.pipeline.pictures import files_of


def make(folder, kind: str) -> None:
    match kind:
        case "idx":
            write_set(folder, ".gz")
        case "parquet":
            write_parquet(folder / "data/train-0.parquet", {"image": contents(9), "label": list("abcabcabc")})
        case "saved":
            saved(9).save_to_disk(folder)
        case _:
            write_cifar10(folder, kind)


def shards(directory) -> dict[str, bytes]:
    return {name: content for name, content in files_of(directory).items() if name.endswith((".tar", ".idx"))}


@pytest.mark.parametrize("kind", ["idx", "parquet", "saved", "binary", "python"])
def test_tables_behind_a_url_are_those_of_the_folder(tmp_path, kind):
    make(tmp_path / "set", kind)
    url = f"memory://{tmp_path.name}/{kind}"
    fsspec.filesystem("memory").put(str(tmp_path / "set"), url, recursive=True)
    ingest(str(tmp_path / "set"), tmp_path / "local", IngestConfig())
    ingest(url, tmp_path / "remote", IngestConfig())
    assert shards(tmp_path / "local") == shards(tmp_path / "remote") != {}
    assert (tmp_path / "local/rejected.jsonl").read_bytes() == (tmp_path / "remote/rejected.jsonl").read_bytes()
    assert read_index(tmp_path / "local").classes == read_index(tmp_path / "remote").classes
    assert not list((tmp_path / "remote").glob(".unpacked*"))


@pytest.mark.parametrize("kind", ["idx", "parquet", "saved", "binary", "python"])
@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_tables_in_an_archive_are_read_without_unpacking_it_by_hand(tmp_path, kind, suffix):
    make(tmp_path / "in" / kind, kind)
    archive = tmp_path / f"{kind}{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as out:
            for path in sorted((tmp_path / "in").rglob("*.*" if kind != "python" else "*")):
                if path.is_file():
                    out.write(path, path.relative_to(tmp_path / "in"))
    else:
        with tarfile.open(archive, "w:gz") as out:
            out.add(tmp_path / "in" / kind, kind)
    config = IngestConfig(split_fractions={"train": 1.0})
    ingest(str(tmp_path / "in" / kind), tmp_path / "local", config)
    ingest(str(archive), tmp_path / "archived", config)
    local, archived = read_index(tmp_path / "local"), read_index(tmp_path / "archived")
    assert local.classes == archived.classes
    assert {s: local.num_samples(s) for s in local.splits} == {s: archived.num_samples(s) for s in archived.splits}
    assert not list((tmp_path / "archived").glob(".unpacked*"))


def test_damage_behind_a_url_is_said_by_its_url(tmp_path):
    write_set(tmp_path / "set")
    path = tmp_path / "set/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    url = f"memory://{tmp_path.name}/cut"
    fsspec.filesystem("memory").put(str(tmp_path / "set"), url, recursive=True)
    with pytest.raises(InputError) as caught:
        ingest(url, tmp_path / "dataset", IngestConfig())
    assert str(caught.value).startswith(f"{url}/train-images-idx3-ubyte: cut: ")
    assert not (tmp_path / "dataset").exists()


def test_whoever_has_no_arrow_tables_does_not_wait_for_pyarrow(tmp_path):
    make(tmp_path / "set", "idx")
    code = f"""
import sys
from pathlib import Path
from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.opening import list_source
with Scratch(Path({str(tmp_path / "dataset")!r})) as scratch:
    source, listing = list_source({str(tmp_path / "set")!r}, IngestConfig(), scratch)
    source.read(listing.images[0].path)
assert "pyarrow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["idx", "parquet", "saved", "python"])
def test_workers_find_what_they_read_laid_out(tmp_path, kind):
    """A worker that had to unpack a table would lay its memory and time to the image that it asked for."""
    make(tmp_path / "set", kind)
    with Scratch(tmp_path / "dataset") as scratch:
        source, listing = list_source(str(tmp_path / "set"), IngestConfig(), scratch)
        source.lay_out()
        made = {path: path.stat().st_mtime_ns for path in scratch.folder().iterdir()}
        assert (len(made) > 1) == (kind != "saved")  # which is read where it lies
        tables._located.cache_clear()  # as in another process
        assert all(source.read(file.path) for file in listing.images)
        assert {path: path.stat().st_mtime_ns for path in scratch.folder().iterdir()} == made


def test_a_finished_dataset_lays_nothing_out_again(tmp_path, monkeypatch):
    make(tmp_path / "set", "parquet")
    ingest(str(tmp_path / "set"), tmp_path / "dataset", IngestConfig())
    monkeypatch.delattr(tables.TableSource, "read")
    monkeypatch.setattr(tables, "_located", None)
    assert ingest(str(tmp_path / "set"), tmp_path / "dataset", IngestConfig()).shards_written == 0


def test_a_destination_that_cannot_be_made_is_an_input_error(tmp_path):
    make(tmp_path / "set", "parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/dataset: cannot be made .Not a directory."):
        ingest(str(tmp_path / "set"), tmp_path / "file/dataset", IngestConfig())


def test_what_another_ingestion_uses_is_left_to_it(tmp_path):
    with Scratch(tmp_path / "dataset") as scratch:
        (scratch.folder() / "spool").write_bytes(b"in use")
        (tmp_path / "dataset/.unpacked-1-tables").mkdir()
        (tmp_path / "dataset/.unpacked-1-tables/lock").write_bytes(b"")
        remove_unpacked(tmp_path / "dataset")
        assert (scratch.folder() / "spool").exists()
        assert not (tmp_path / "dataset/.unpacked-1-tables").exists()
    assert not (tmp_path / "dataset").exists()


@pytest.mark.slow
def test_a_killed_ingestion_of_tables_goes_on_and_leaves_nothing_behind(tmp_path):
    images = contents(400)
    write_parquet(tmp_path / "set/train.parquet", {"image": images, "label": [0, 1] * 200}, row_group_size=40)
    command = f"""
from pathlib import Path
from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import ingest
ingest({str(tmp_path / "set")!r}, Path({str(tmp_path / "killed")!r}), IngestConfig(samples_per_shard=10, workers=1))
"""
    process = subprocess.Popen([sys.executable, "-c", command])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*.tar"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "killed").glob(".unpacked*"))
    config = IngestConfig(samples_per_shard=10)
    report = ingest(str(tmp_path / "set"), tmp_path / "killed", config)
    ingest(str(tmp_path / "set"), tmp_path / "whole", config)
    assert 0 < report.shards_kept < 40
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "killed").glob(".*")} == {".ingest.jsonl", ".hashes"}


def test_a_full_disk_is_no_fault_of_the_images(tmp_path, monkeypatch):
    """The spool of a table needs as much room as its images; without it nothing is rejected and nothing published."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    monkeypatch.setattr(plan, "POOL_FROM_BYTES", 1 << 40)
    noise = [os.urandom(50_000) for _ in range(60)]
    write_parquet(tmp_path / "set/train.parquet", {"image": pa.array(noise, pa.binary())})
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(Exception, match="No space left on device") as caught:
            ingest(str(tmp_path / "set"), small / "dataset", IngestConfig())
        assert not isinstance(caught.value, InputError)
        assert not (small / "dataset/index.json").exists() and not list((small / "dataset").glob(".unpacked*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_million_rows_stay_small(tmp_path):
    """A listing is tuples and shared names: less than 600 bytes a row, also in one row group."""
    code = f"""
import resource
from pathlib import Path
from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.opening import list_source
with Scratch(Path({str(tmp_path / "dataset")!r})) as scratch:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    listing = list_source({str(tmp_path / "train.parquet")!r}, IngestConfig(), scratch).listing
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(len(listing.images), grown * 1024 / len(listing.images))
"""
    count = 200_000
    head = b"\x89PNG\r\n"
    pq.write_table(
        pa.table({"image": [head + number.to_bytes(4, "big") for number in range(count)], "label": [7] * count}),
        tmp_path / "train.parquet",
        row_group_size=count,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, bytes_a_row = done.stdout.split()
    assert int(rows) == count and float(bytes_a_row) < 600
