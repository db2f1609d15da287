"""Zips are read where they lie, and trusted no further than they deserve."""

import gc
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.archives.source import ArchiveSource, _opened, _pread, archives_at
from pipeline.ingestion.build import ingest
from pipeline.ingestion.making import IngestError
from pipeline.shards.check import check_dataset
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.pictures import class_folders, encoded, picture, shards_of

needs_data = pytest.mark.skipif("VIT_TEST_DATA" not in os.environ, reason="VIT_TEST_DATA names no folder")


def write_zip(path, entries, method=zipfile.ZIP_STORED):
    """`entries`: (name or ZipInfo, content); with a comment that looks like the end of a zip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
        archive.comment = b"PK\5\6 is how a zip ends"
    return path


def files_in(folder):
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()]


def source_of(path):
    return ArchiveSource(archives_at([path]))


def labels_by_path(directory):
    """source -> (split, class) of every sample."""
    index = read_index(directory)
    found = {}
    for split in index.splits:
        reader = ShardReader(index, split)
        for shard, size in enumerate(reader.shard_sizes):
            for sample in range(size):
                record = reader.record(shard, sample)
                found[record["source"]] = split, record.get("class")
    return found


def rejected_of(directory):
    lines = (directory / "rejected.jsonl").read_text().splitlines()
    return [(entry["path"], entry["reason"]) for entry in map(json.loads, lines)]


def streamed(path, entries):
    class Pipe(io.RawIOBase):
        content = bytearray()

        def writable(self):
            return True

        def write(self, piece):
            self.content += piece
            return len(piece)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # sizes behind the data, not before
        for name, content in entries:
            archive.writestr(name, content)
    path.write_bytes(bytes(pipe.content))


def as_zip_64(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(content)


def self_extracting(path, entries):
    content = write_zip(path, entries).read_bytes()
    path.write_bytes(b"#!/bin/sh\nexit\n" * 99 + content)


def with_long_extra_fields(path, entries):
    infos = []
    for name, content in entries:
        info = zipfile.ZipInfo(name)
        info.extra = struct.pack("<2H", 0xCAFE, 300) + bytes(300)
        infos.append((info, content))
    write_zip(path, infos)


@pytest.mark.parametrize("make", [
    write_zip,
    lambda path, entries: write_zip(path, entries, zipfile.ZIP_DEFLATED),
    streamed,
    as_zip_64,
    self_extracting,
    with_long_extra_fields,
])  # fmt: skip
def test_every_kind_of_zip_holds_the_files_of_its_folder(tmp_path, make):
    files = files_in(class_folders(tmp_path / "source"))
    make(tmp_path / "source.zip", files)
    source = source_of(tmp_path / "source.zip")
    listing = source.list_files()
    assert listing.rejected == [] and {path: source.read(path) for path in listing.images.paths} == dict(files)
    assert [source.read(path, 100) for path, _ in files] == [content[:100] for _, content in files]
    assert [(file.path, file.bytes) for file in listing.images] == [(name, len(content)) for name, content in files]


def test_a_zip_gives_the_bytes_that_its_folder_gives(tmp_path):
    folder = class_folders(tmp_path / "source")
    write_zip(tmp_path / "source.zip", files_in(folder), zipfile.ZIP_DEFLATED)
    config = IngestConfig(samples_per_shard=7)
    ingest(str(folder), tmp_path / "of_folder", config)
    ingest(str(tmp_path / "source.zip"), tmp_path / "of_zip", config)
    assert shards_of(tmp_path / "of_zip") == shards_of(tmp_path / "of_folder")
    assert len(shards_of(tmp_path / "of_zip")) > 10
    assert read_index(tmp_path / "of_zip").fingerprint == read_index(tmp_path / "of_folder").fingerprint


def test_a_million_entries_would_not_travel_to_each_worker(tmp_path):
    source = source_of(write_zip(tmp_path / "a.zip", [(f"{number}.jpg", b"x" * number) for number in range(2000)]))
    listed = source.list_files()
    assert len(listed.images) == 2000
    few = pickle.loads(sent := pickle.dumps(source.narrowed(["7.jpg", "1999.jpg"])))
    assert len(sent) < 2000
    assert (few.read("7.jpg"), len(few.read("1999.jpg")), few.read("1999.jpg", 3)) == (b"x" * 7, 1999, b"xxx")
    with pytest.raises(FileNotFoundError):
        few.read("8.jpg")
    assert pickle.loads(pickle.dumps(source)).read("8.jpg") == b"x" * 8


def test_hostile_and_odd_names_become_paths_or_are_named(tmp_path):
    link = zipfile.ZipInfo("link.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    windows = zipfile.ZipInfo("placeholder.jpg")
    windows.create_system = 0
    image = encoded(picture(0))
    names = ["../../escape.jpg", "../climbs.txt", "/etc/absolute.jpg", "C:/drive.jpg", "./dot/./plain.jpg",
             "a//b.jpg", "dir/", "__MACOSX/._plain.jpg", "no_suffix", "notes.txt", "tür/日本.jpg",
             "with space.v1.2.jpg"]  # fmt: skip
    entries = [(name, b"" if name.endswith("/") else b"?" if "." in name[-4:] and "jpg" not in name else image)
               for name in names]  # fmt: skip
    entries = [(name, b"\0\5\x16\7" if "MACOSX" in name else content) for name, content in entries]
    path = write_zip(tmp_path / "a.zip", [*entries, (link, b"/etc/passwd"), ("tuer.jpg", image), (windows, image)])
    content = path.read_bytes().replace(b"placeholder.jpg", b"dos\\folder1.jpg").replace(b"tuer.jpg", b"t\x81er.jpg")
    path.write_bytes(content)
    listing = source_of(path).list_files()
    assert sorted(file.path for file in listing.images) == [
        "../../escape.jpg", "a/b.jpg", "dos/folder1.jpg", "dot/plain.jpg", "drive.jpg", "etc/absolute.jpg", "no_suffix",
        "tüer.jpg", "tür/日本.jpg", "with space.v1.2.jpg",
    ]  # fmt: skip
    assert sorted((entry.path, entry.reason) for entry in listing.rejected) == [
        ("../climbs.txt", "unsafe_name"),
        ("__MACOSX/._plain.jpg", "not_an_image"),
        ("link.jpg", "unreadable_file"),
        ("notes.txt", "not_an_image"),
    ]
    report = ingest(str(path), tmp_path / "dataset", IngestConfig(max_rejected_fraction=0.5))
    assert sum(report.samples.values()) == 10 and check_dataset(tmp_path / "dataset", full=True) == []
    assert not (tmp_path.parent / "escape.jpg").exists()
    assert ".." not in (read_index(tmp_path / "dataset").classes or ())
    names = [name for tar in (tmp_path / "dataset").glob("*.tar") for name in tarfile.open(tar).getnames()]
    assert not any(".." in name for name in names) and any("escape" in name for name in names)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_a_name_that_is_there_twice_the_last_stands_and_the_other_is_named(tmp_path):
    first, last = encoded(picture(1)), encoded(picture(2))
    path = write_zip(tmp_path / "a.zip", [("a.jpg", first), ("b.jpg", first), ("./a.jpg", last), ("a.jpg", last)])
    source = source_of(path)
    listing = source.list_files()
    assert sorted(file.path for file in listing.images) == ["a.jpg", "b.jpg"]
    assert [(entry.path, entry.reason) for entry in listing.rejected] == [("a.jpg", "repeated_name")] * 2
    assert source.read("a.jpg") == last and source.read("b.jpg") == first


def test_entries_that_cannot_be_read_are_rejected_with_the_reason(tmp_path):
    image = encoded(picture(0, 200, 200), quality=95)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, method in [("whole.jpg", 0), ("flipped.jpg", 0), ("inflated.jpg", 8), ("lzma.jpg", 14)]:
            archive.writestr(name, image, method)
        archive.writestr("secret.jpg", image)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    content[offsets["flipped.jpg"] + 3000] ^= 1
    content[offsets["inflated.jpg"] + 100 : offsets["inflated.jpg"] + 130] = b"\xff" * 30
    at = content.rindex(b"secret.jpg") - 46
    content[at + 8] |= 1  # encrypted
    path.write_bytes(content)
    ingest(str(path), tmp_path / "dataset", IngestConfig(max_rejected_fraction=0.9))
    assert rejected_of(tmp_path / "dataset") == [
        ("flipped.jpg", "broken_image"),
        ("inflated.jpg", "broken_image"),
        ("lzma.jpg", "unreadable_file"),
        ("secret.jpg", "unreadable_file"),
    ]
    details = (tmp_path / "dataset/rejected.jsonl").read_text()
    assert all(words in details for words in ("CRC-32", "does not inflate", "method 14 (LZMA)", "encrypted"))
    with pytest.raises(IngestError, match="2 broken_image, 2 unreadable_file"):
        ingest(str(path), tmp_path / "strict", IngestConfig())


def test_a_bomb_in_a_zip_is_refused_before_it_inflates(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("bomb.jpg", bytes(10_000_000))], zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    for said, outcome in ((1 << 30, "file_too_large"), (100, "broken_image")):
        changed = bytearray(content)
        struct.pack_into("<L", changed, content.rindex(b"PK\1\2") + 24, said)
        path.write_bytes(changed)
        source = source_of(path)
        assert source.list_files().images[0].bytes == said
        with pytest.raises(ImageFault) as caught:
            source.read("bomb.jpg")
        assert caught.value.reason == outcome


def test_whatever_is_damaged_there_is_an_answer_and_never_a_traceback(tmp_path):
    content = write_zip(tmp_path / "a.zip", [(f"{n}.jpg", bytes([n]) * 50) for n in range(5)], 8).read_bytes()
    damage = random.Random(0)
    path, refused = tmp_path / "b.zip", 0
    cases = [content[:size] for size in range(0, len(content), 7)]
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(damage.randint(1, 4)):
            changed[damage.randrange(len(changed))] = damage.choice([0, 1, 0xFF, damage.randrange(256)])
        cases.append(bytes(changed))
    for number, case in enumerate(cases):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(case)
        source = source_of(path)
        try:
            for file in source.list_files().images:
                try:
                    source.read(file.path)
                except (ImageFault, OSError):
                    refused += 1
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("content, words", [
    (b"", "no zip"),
    (b"<html>404</html>", "no zip"),
    (b"PK\3\4" + bytes(1000), "ends before its directory"),
])  # fmt: skip
def test_what_is_no_zip_says_so_and_nothing_is_written(tmp_path, content, words):
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError, match=words):
        ingest(str(tmp_path / "a.zip"), tmp_path / "dataset", IngestConfig())
    assert not (tmp_path / "dataset").exists()


def test_one_changed_entry_rewrites_one_shard(tmp_path):
    entries = files_in(class_folders(tmp_path / "source"))
    config = IngestConfig(samples_per_shard=7, splits="folders", split_fractions={"train": 1.0})
    made = ingest(str(write_zip(tmp_path / "a.zip", entries)), tmp_path / "dataset", config)
    assert made.shards_written == 6
    write_zip(tmp_path / "a.zip", entries, zipfile.ZIP_DEFLATED)  # another file, of the same entries
    assert ingest(str(tmp_path / "a.zip"), tmp_path / "dataset", config).shards_written == 0
    entries[3] = (entries[3][0], encoded(picture(99)))
    write_zip(tmp_path / "a.zip", entries)
    assert ingest(str(tmp_path / "a.zip"), tmp_path / "dataset", config).shards_written == 1
    assert check_dataset(tmp_path / "dataset", full=True) == []


def pictures_named(*names):
    return [(name, encoded(picture(zlib.crc32(name.encode())))) for name in names]


@pytest.mark.parametrize("zips, source, expected", [
    # split archives, with and without their own name inside
    ({"train.zip": ["train/ant/1.jpg", "train/bee/2.jpg"], "val.zip": ["val/ant/3.jpg", "val/bee/4.jpg"]}, "*.zip", {
        "train/ant/1.jpg": ("train", "ant"), "train/bee/2.jpg": ("train", "bee"),
        "val/ant/3.jpg": ("validation", "ant"), "val/bee/4.jpg": ("validation", "bee")}),
    ({"train.zip": ["ant/1.jpg", "bee/2.jpg"], "test.zip": ["ant/3.jpg", "bee/4.jpg"]}, "{train,test}.zip", {
        "train/ant/1.jpg": ("train", "ant"), "train/bee/2.jpg": ("train", "bee"),
        "test/ant/3.jpg": ("test", "ant"), "test/bee/4.jpg": ("test", "bee")}),
    # a class each
    ({"ant.zip": ["1.jpg"], "bee.zip": ["1.jpg", "2.jpg"]}, "", {
        "ant/1.jpg": ("train", "ant"), "bee/1.jpg": ("train", "bee"), "bee/2.jpg": ("train", "bee")}),
    ({"train/ant.zip": ["1.jpg"], "train/bee.zip": ["1.jpg"], "val/ant.zip": ["2.jpg"], "val/bee.zip": ["2.jpg"]}, "", {
        "train/ant/1.jpg": ("train", "ant"), "train/bee/1.jpg": ("train", "bee"),
        "val/ant/2.jpg": ("validation", "ant"), "val/bee/2.jpg": ("validation", "bee")}),
    # parts of one set: their folders are the classes, and without folders there are none
    ({"part1.zip": ["ant/1.jpg", "bee/2.jpg"], "part2.zip": ["ant/1.jpg"]}, "part{1..2}.zip", {
        "part1/ant/1.jpg": ("train", "ant"), "part1/bee/2.jpg": ("train", "bee"), "part2/ant/1.jpg": ("train", "ant")}),
    ({"images_000.zip": ["1.jpg"], "images_001.zip": ["1.jpg"]}, "images_*.zip", {
        "images_000/1.jpg": ("train", None), "images_001/1.jpg": ("train", None)}),
])  # fmt: skip
def test_several_zips_are_one_set_with_its_splits_and_classes(tmp_path, zips, source, expected):
    for name, names in zips.items():
        write_zip(tmp_path / "zips" / name, pictures_named(*names))
    (tmp_path / "zips/README").write_text("x")
    config = IngestConfig(split_fractions={"train": 1.0})
    ingest(f"{tmp_path}/zips/{source}", tmp_path / "dataset", config)
    assert labels_by_path(tmp_path / "dataset") == expected
    assert rejected_of(tmp_path / "dataset") == ([] if source else [("README", "not_an_image")])


def test_what_a_zip_cannot_be_says_what_to_type(tmp_path):
    path = write_zip(tmp_path / "zips/a.zip", pictures_named("1.jpg"))
    (tmp_path / "zips/a.tar").write_bytes(b"")
    for source, config, words in [
        (path, {"tars": "rewrite"}, "tars: rewrite: a zip is read in place"),
        (tmp_path / "zips", {}, "ingested one after the other"),
        (f"{tmp_path}/zips/a.{{zip,tar}}", {}, "zips and tars in one source"),
        (f"{tmp_path}/zips/{{a,b}}.zip", {}, "b.zip: no such zip"),
        ("sklearn:digits", {"tars": "adopt"}, "for tars, and there are none"),
    ]:
        with pytest.raises(InputError, match=words):
            ingest(str(source), tmp_path / "dataset", IngestConfig(**config))
    assert not (tmp_path / "dataset").exists()


@pytest.mark.data
@pytest.mark.slow
@needs_data
def test_caltech_101_and_cifar_10_come_out_of_their_zips_with_right_counts_and_classes(tmp_path):
    data = Path(os.environ["VIT_TEST_DATA"])
    lists = {split: data / f"caltech101/{split}.txt" for split in ("train", "test")}
    report = ingest(str(data / "caltech101/caltech101_99.zip"), tmp_path / "caltech", IngestConfig(splits=lists))
    assert (report.samples, report.num_classes, report.rejected) == ({"train": 5204, "test": 2603}, 99, {})
    assert read_index(report.directory).classes == tuple((data / "caltech101/classes.txt").read_text().split())
    report = ingest(str(data / "cifar10/cifar10_png_15k.zip"), tmp_path / "cifar", IngestConfig())
    assert (report.samples, report.num_classes, report.rejected) == ({"train": 10000, "test": 5000}, 10, {})
    assert read_index(report.directory).classes == tuple((data / "cifar10/classes.txt").read_text().split())


def test_a_file_that_is_no_longer_kept_open_stays_open_for_who_reads_it(tmp_path):
    """Two threads that open an archive at once: one file of theirs is kept, the other must last for its reader."""
    path = write_zip(tmp_path / "a.zip", [("1.jpg", encoded(picture(1)))])
    (archive,) = archives_at([path])
    pread = _pread(archive)
    _opened.cache_clear()
    gc.collect()
    assert pread(2, 0) == b"PK"
