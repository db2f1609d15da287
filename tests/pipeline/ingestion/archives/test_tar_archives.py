"""Tars of folders read in place, compressed ones unpacked for as long as it takes, WebDataset tars written anew."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time

import pyarrow
import pytest
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.archives import unpacking
from pipeline.ingestion.archives.source import ArchiveSource, archives_at
from pipeline.ingestion.archives.unpacking import UNPACKED_PREFIX, Scratch
from pipeline.ingestion.build import ingest
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from tests.pipeline.ingestion.archives.test_zips import files_in, labels_by_path, pictures_named, rejected_of
from tests.pipeline.pictures import class_folders, encoded, picture, shards_of, write_tar

COMPRESSORS = {
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": lambda content: b"".join(
        pyarrow.compress(content[start : start + 20000], codec="zstd", asbytes=True)  # in frames, as zstd -T writes
        for start in range(0, len(content), 20000)
    ),
}


def packed(path, members, form="tar.gz"):
    plain = write_tar(path.with_suffix(".plain"), members)
    path = path.with_suffix(f".{form}")
    path.write_bytes(COMPRESSORS[form](plain.read_bytes()))
    plain.unlink()
    return path


def unpacked_in(directory):
    return list(directory.glob(f"{UNPACKED_PREFIX}*")) if directory.exists() else []


@pytest.fixture(scope="module")
def of_folder(tmp_path_factory):
    """(files of a folder, the shards that it gives)"""
    folder = class_folders(tmp_path_factory.mktemp("here") / "source")
    ingest(str(folder), folder.parent / "dataset", IngestConfig(samples_per_shard=7))
    return files_in(folder), shards_of(folder.parent / "dataset")


@pytest.mark.parametrize("form", ["tar", *COMPRESSORS])
def test_a_tar_of_folders_gives_the_bytes_that_its_folder_gives(tmp_path, of_folder, form):
    files, shards = of_folder
    members = [(f"./{name}", content) for name, content in files]
    path = write_tar(tmp_path / "a.tar", members) if form == "tar" else packed(tmp_path / "a", members, form)
    report = ingest(str(path), tmp_path / "dataset", IngestConfig(samples_per_shard=7))
    assert report.tars == "archive" and read_index(report.directory).classes == ("ant", "bee")
    assert len(shards) > 10 and shards_of(report.directory) == shards and not unpacked_in(report.directory)


def test_links_stay_inside_the_tar_or_are_rejected(tmp_path):
    path = tmp_path / "a.tar"
    image = encoded(picture(1))
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:

        def add(name, kind=tarfile.REGTYPE, target="", content=b""):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(content)
            tar.addfile(info, io.BytesIO(content))

        add("ant", tarfile.DIRTYPE)
        add("ant/" + "x" * 150 + ".jpg", content=image)
        add("ant/1.jpg", content=image)
        add("bee/hard.jpg", tarfile.LNKTYPE, "ant/1.jpg")
        add("bee/soft.jpg", tarfile.SYMTYPE, "../ant/1.jpg")
        add("bee/chain.jpg", tarfile.SYMTYPE, "soft.jpg")
        add("bee/out.jpg", tarfile.SYMTYPE, "../../../../etc/passwd")
        add("bee/root.jpg", tarfile.SYMTYPE, "/etc/passwd")
        add("bee/circle.jpg", tarfile.SYMTYPE, "circle.jpg")
        add("bee/folder.jpg", tarfile.SYMTYPE, "../ant")
        add("bee/pipe.jpg", tarfile.FIFOTYPE)
        add("/absolute/1.jpg", content=image)
        add("../climbs.jpg", content=image)
        add("empty.jpg")
    source = ArchiveSource(archives_at([path]))
    listing = source.list_files()
    found = {file.path: source.read(file.path) for file in listing.images}
    assert found.pop("empty.jpg") == b""
    assert sorted(found) == [
        "../climbs.jpg", "absolute/1.jpg", "ant/1.jpg", "ant/" + "x" * 150 + ".jpg", "bee/chain.jpg",
        "bee/hard.jpg", "bee/soft.jpg",
    ]  # fmt: skip
    assert set(found.values()) == {image}
    assert {entry.path: entry.reason for entry in listing.rejected} == {
        **dict.fromkeys([f"bee/{name}.jpg" for name in ("out", "root", "circle", "folder", "pipe")], "unreadable_file"),
    }


def test_a_cut_tar_of_folders_is_refused_and_so_is_a_cut_compressed_one(tmp_path):
    members = pictures_named("ant/1.jpg", "bee/2.jpg")
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    for form, compress in {"tar": bytes, **COMPRESSORS}.items():
        content = compress(whole)
        path = tmp_path / f"cut.{form}"
        path.write_bytes(content[: len(whole.rstrip(b"\0")) // 2 if form == "tar" else len(content) - 40])
        with pytest.raises(InputError, match=f"cut.{form}.*fetch it again"):
            ingest(str(path), tmp_path / "dataset", IngestConfig())
        path.write_bytes(b"<html>not found</html>" * 100)
        with pytest.raises(InputError, match=f"cut.{form}.*fetch it again"):
            ingest(str(path), tmp_path / "dataset", IngestConfig())
    assert not (tmp_path / "dataset").exists()


def test_what_a_killed_ingestion_unpacked_goes_and_what_another_reads_stays(tmp_path):
    path = packed(tmp_path / "a", pictures_named("ant/1.jpg", "bee/2.jpg"))
    directory = tmp_path / "dataset"
    directory.mkdir()
    (directory / f"{UNPACKED_PREFIX}1-0-a.tar").write_bytes(b"left behind")
    with Scratch(directory) as other:
        theirs = other.unpack(path)
        report = ingest(str(path), directory, IngestConfig())
        assert unpacked_in(directory) == [theirs] and theirs.stat().st_size > 0
        assert sum(report.samples.values()) == 2
    assert not unpacked_in(directory)


def test_a_kill_while_a_tar_is_unpacked_leaves_nothing_that_the_next_run_does_not_remove(tmp_path):
    os.mkfifo(tmp_path / "a.tar.gz")  # a download that never ends
    code = "import sys; from pathlib import Path; from pipeline.ingestion.archives.unpacking import Scratch; "
    code += "Scratch(Path(sys.argv[1])).unpack(Path(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(tmp_path / "dataset"), str(tmp_path / "a.tar.gz")]
    with subprocess.Popen(command) as process, open(tmp_path / "a.tar.gz", "wb") as pipe:
        pipe.write(gzip.compress(os.urandom(5 << 20))[: 4 << 20])
        deadline = time.monotonic() + 30
        while not unpacked_in(tmp_path / "dataset") and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert unpacked_in(tmp_path / "dataset")
    path = packed(tmp_path / "b", pictures_named("ant/1.jpg", "bee/2.jpg"))
    report = ingest(str(path), tmp_path / "dataset", IngestConfig())
    assert sum(report.samples.values()) == 2 and not unpacked_in(tmp_path / "dataset")


@pytest.mark.parametrize("form", COMPRESSORS)
def test_a_compressed_tar_that_unpacks_to_hundreds_of_times_its_size_is_refused_early(tmp_path, monkeypatch, form):
    monkeypatch.setattr(unpacking, "SURELY_BYTES", 1 << 20)
    monkeypatch.setattr(unpacking, "PIECE_BYTES", 1 << 16)
    bomb = packed(tmp_path / "bomb", [("ant/1.jpg", bytes(24 << 20))], form)
    with Scratch(tmp_path / "dataset") as scratch:
        with pytest.raises(InputError, match=f"bomb.{form}: unpacks to more than .* a bomb does; .*unpack it yourself"):
            scratch.unpack(bomb)
        (unpacked,) = unpacked_in(tmp_path / "dataset")
        assert unpacked.stat().st_size <= max(1 << 20, 200 * bomb.stat().st_size) < 24 << 20
    assert not (tmp_path / "dataset").exists()


def test_the_last_of_a_disk_is_not_filled_with_a_tar(tmp_path, monkeypatch):
    path = packed(tmp_path / "a", [("ant/1.jpg", b"x")])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=500 << 30, free=1 << 30))
    with pytest.raises(InputError, match="no room to unpack .*a.tar.gz .1024 MiB are free.; unpack it where there is"):
        ingest(str(path), tmp_path / "dataset", IngestConfig())
    assert not (tmp_path / "dataset").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_disk_that_is_full_while_a_tar_is_unpacked_names_the_way_out(tmp_path):
    path = packed(tmp_path / "a", [("ant/1.jpg", os.urandom(3 << 20)), ("bee/1.jpg", b"x")])
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(InputError, match="no room to unpack .*a.tar.gz.*unpack it where there is"):
            ingest(str(path), small / "dataset", IngestConfig())
        assert not (small / "dataset").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def samples(count, start=0, partner="cls"):
    return [member for n in range(start, start + count) for member in (
        (f"{n:04d}.jpg", encoded(picture(n))), (f"{n:04d}.{partner}", str(n % 3).encode()))]  # fmt: skip


@pytest.mark.parametrize("tars, source, decided", [
    ({"a.tar": samples(4)}, "a.tar", "adopt"),
    ({"a.tar": pictures_named("1.jpg", "2.jpg")}, "a.tar", "adopt"),
    ({"a-0.tar": pictures_named("1.jpg"), "a-1.tar": pictures_named("2.jpg")}, "a-{0..1}.tar", "adopt"),
    ({"a.tar": [("d/1.jpg", encoded(picture(1))), ("d/1.json", b"{}")]}, "a.tar", "adopt"),
    ({"a.tar": [("README", b"x"), *pictures_named("ant/1.jpg", "bee/2.jpg")]}, "a.tar", "archive"),
    ({"a.tar.gz": samples(4)}, "a.tar.gz", "rewrite"),
    ({"a.tar.gz": pictures_named("ant/1.jpg", "bee/2.jpg")}, "a.tar.gz", "archive"),
])  # fmt: skip
def test_what_becomes_of_tars_is_decided_by_what_lies_beside_the_images(tmp_path, tars, source, decided):
    for name, members in tars.items():
        packed(tmp_path / "a", members) if name.endswith("gz") else write_tar(tmp_path / name, members)
    report = ingest(str(tmp_path / source), tmp_path / "dataset", IngestConfig())
    assert report.tars == decided
    assert check_dataset(tmp_path / "dataset", full=True) == []


def test_tars_that_may_be_classes_or_shards_are_asked_about(tmp_path):
    for name in ("n01440764", "n01443537"):
        write_tar(tmp_path / f"train/{name}.tar", pictures_named(f"{name}_1.JPEG", f"{name}_2.JPEG"))
    for source in (f"{tmp_path}/train/*.tar", f"{tmp_path}/train", str(tmp_path)):
        with pytest.raises(InputError, match="--set tars=archive for classes, tars=adopt for shards"):
            ingest(source, tmp_path.parent / "dataset", IngestConfig())
    config = IngestConfig(tars="archive", split_fractions={"train": 1.0})
    report = ingest(str(tmp_path / "train"), tmp_path.parent / f"{tmp_path.name}-dataset", config)
    assert labels_by_path(report.directory)["n01443537/n01443537_2.JPEG"] == ("train", "n01443537")
    adopted = ingest(f"{tmp_path}/train/*.tar", tmp_path / "adopted", IngestConfig(tars="adopt"))
    assert (adopted.samples, adopted.num_classes) == ({"train": 4}, 0)


@pytest.mark.slow
def test_webdataset_tars_are_written_anew_with_the_samples_and_labels_that_webdataset_reads(tmp_path):
    import webdataset as wds

    rotated = Image.Exif()
    rotated[0x0112] = 6
    for number in range(3):
        write_tar(tmp_path / f"tars/set-{number}.tar", samples(5, number * 5))
    write_tar(tmp_path / "tars/set-3.tar", [
        ("x/rotated.jpg", encoded(picture(90), exif=rotated)), ("x/rotated.json", b'{"label": 1}'),
        ("x/rotated.mask.png", b"m"), ("lonely.cls", b"1"), ("two.a.jpg", b"x"), ("two.b.jpg", b"x"),
        ("../up.jpg", encoded(picture(91))), ("0000.jpg", encoded(picture(92))), ("README", b"x"),
    ])  # fmt: skip
    config = IngestConfig(
        tars="rewrite", samples_per_shard=4, split_fractions={"train": 1.0}, max_rejected_fraction=0.9
    )
    report = ingest(f"{tmp_path}/tars/set-{{0..3}}.tar", tmp_path / "dataset", config)
    theirs = {}
    for number in range(3):
        for sample in wds.WebDataset([f"{tmp_path}/tars/set-{number}.tar"], shardshuffle=False):
            theirs[sample["jpg"]] = int(sample["cls"])
    ours = {}
    for sample in wds.WebDataset(sorted(map(str, report.directory.glob("*.tar"))), shardshuffle=False).decode():
        ours[sample["__key__"]] = sample["json"]
    by_hash = {record["sha256"]: record.get("label") for record in ours.values()}
    assert {hashlib.sha256(image).hexdigest(): label for image, label in theirs.items()}.items() <= by_hash.items()
    upright = next(record for record in ours.values() if record["source"] == "set-3/x/rotated.jpg")
    assert (upright["label"], upright["width"], upright["height"]) == (1, 16, 24)
    assert report.samples == {"train": 17} and report.num_classes == 3
    assert rejected_of(report.directory) == [
        ("set-3/../up", "unsafe_name"), ("set-3/README", "not_an_image"), ("set-3/lonely", "no_image"),
        ("set-3/two", "several_images"), ("set-3/x/rotated.mask.png", "not_an_image"),
    ]  # fmt: skip
    assert check_dataset(report.directory, full=True) == []


def test_the_output_of_img2dataset_is_taken_as_a_folder(tmp_path):
    def of(number, caption):
        record = {"url": f"https://x.org/{number}", "caption": caption, "status": "success", "width": 24, "height": 16,
                  "key": f"{number:09d}", "exif": "{}", "sha256": "0"}  # fmt: skip
        return [(f"{number:09d}.jpg", encoded(picture(number))), (f"{number:09d}.json", json.dumps(record).encode()),
                (f"{number:09d}.txt", caption.encode())]  # fmt: skip

    for shard in range(2):
        write_tar(tmp_path / f"out/{shard:05d}.tar", [m for n in range(3) for m in of(shard * 10000 + n, "a red bird")])
        (tmp_path / f"out/{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"out/{shard:05d}_stats.json").write_text("{}")
    for tars, name, said in ((None, "adopted", {}), ("rewrite", "rewritten", {"split_fractions": {"train": 1.0}})):
        report = ingest(str(tmp_path / "out"), tmp_path / name, IngestConfig(tars=tars, **said))
        assert (report.tars, report.samples, report.num_classes) == (tars or "adopt", {"train": 6}, 0)
        assert dict(rejected_of(tmp_path / name)) == {
            f"0000{shard}{end}": "not_an_image" for shard in range(2) for end in (".parquet", "_stats.json")
        }


def test_rewritten_tars_follow_their_names_or_what_the_config_says_of_splits_and_labels(tmp_path):
    for name in ("a-train-0", "a-val-0", "a-more"):
        write_tar(
            tmp_path / f"tars/{name}.tar", [(f"{name}.1.jpg", encoded(picture(len(name)))), (f"{name}.1.cls", b"0")]
        )
    source = f"{tmp_path}/tars/*.tar"
    report = ingest(source, tmp_path / "named", IngestConfig(tars="rewrite"))
    assert report.samples == {"train": 2, "validation": 1}
    (tmp_path / "labels.csv").write_text("path,class\na-train-0.1.jpg,ant\na-val-0.1,bee\n")
    config = IngestConfig(tars="rewrite", splits="hash", split_fractions={"test": 1.0}, labels=tmp_path / "labels.csv")
    report = ingest(source, tmp_path / "said", config)
    assert sorted(labels_by_path(report.directory).values(), key=str) == [
        ("test", "ant"), ("test", "bee"), ("test", None)
    ]  # fmt: skip
    with pytest.raises(InputError, match="tars: adopt: a compressed tar"):
        ingest(str(packed(tmp_path / "b", samples(2))), tmp_path / "none", IngestConfig(tars="adopt"))
