"""Existing tars are adopted in place: grouped as webdataset groups, and never trusted further than they deserve."""

import json

import pytest
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion import plan
from pipeline.ingestion.build import ingest
from pipeline.ingestion.making import IngestError
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.pictures import encoded, files_of, picture, shards_of, write_tar


def labelled(count, start=0, label=lambda number: str(number % 3)):
    return [member for number in range(start, start + count) for member in (
        (f"{number:04d}.jpg", encoded(picture(number))), (f"{number:04d}.cls", label(number).encode()))]  # fmt: skip


def adopted(tmp_path, source, **config):
    ingest(str(source), tmp_path / "dataset", IngestConfig(**config))
    return read_index(tmp_path / "dataset", check_sizes=True)


def rejected_of(tmp_path):
    return {
        entry["path"]: entry["reason"]
        for entry in map(json.loads, (tmp_path / "dataset/rejected.jsonl").read_text().splitlines())
    }


def labels_of(index, split="train"):
    reader = ShardReader(index, split)
    return [reader.read(shard, sample).label for shard, size in enumerate(reader.shard_sizes) for sample in range(size)]


def test_tars_are_read_where_they_lie_as_webdataset_reads_them(tmp_path):
    import webdataset as wds

    paths = [write_tar(tmp_path / f"tars/set-{number}.tar", labelled(5, number * 5)) for number in range(3)]
    before = [path.read_bytes() for path in paths]
    index = adopted(tmp_path, tmp_path / "tars/set-{0..2}.tar")
    tables = {f"train-00000{number}.idx" for number in range(3)}
    assert files_of(tmp_path / "dataset").keys() == tables | {
        *("index.json", "rejected.jsonl", "certificate.json", "certificate.html")
    }
    assert [path.read_bytes() for path in paths] == before
    reader = ShardReader(index, "train")
    for shard, path in enumerate(paths):
        theirs = list(wds.WebDataset([str(path)], shardshuffle=False))
        assert len(theirs) == reader.shard_sizes[shard]
        for number, sample in enumerate(theirs):
            ours = reader.read(shard, number)
            assert (ours.key, ours.image, ours.label) == (sample["__key__"], sample["jpg"], int(sample["cls"]))
    assert index.classes == ("0", "1", "2") and index.labelled
    assert check_dataset(tmp_path / "dataset", full=True) == []


def test_integer_labels_of_adopted_tars_may_be_named(tmp_path):
    write_tar(tmp_path / "a.tar", labelled(6))
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    index = adopted(tmp_path, tmp_path / "a.tar", class_names=tmp_path / "names.txt")
    assert index.classes == ("ant", "bee", "cat") and labels_of(index) == [0, 1, 2, 0, 1, 2]
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    with pytest.raises(InputError, match="names.txt: class_names: 2 names, but labels go up to 2"):
        ingest(str(tmp_path / "a.tar"), tmp_path / "other", IngestConfig(class_names=tmp_path / "names.txt"))


@pytest.mark.parametrize("config", [
    {"samples_per_shard": 10}, {"seed": 1}, {"split_fractions": {"train": 0.5, "test": 0.5}},
])  # fmt: skip
def test_what_adopted_tars_cannot_follow_is_refused(tmp_path, config):
    write_tar(tmp_path / "a.tar", labelled(3))
    (key,) = config
    with pytest.raises(InputError, match=f"a.tar: {key}: .*leave it out, or say --set tars=rewrite"):
        adopted(tmp_path, tmp_path / "a.tar", **config)
    assert not (tmp_path / "dataset").exists()


def test_members_of_tars_with_one_name_can_be_told_apart(tmp_path):
    for folder in "ab":
        write_tar(tmp_path / f"{folder}/0.tar", [*labelled(1, ord(folder)), ("0.cls", b"0")])
    adopted(tmp_path, tmp_path / "{a,b}/0.tar", max_rejected_fraction=0.5)
    assert rejected_of(tmp_path) == {"a/0.tar/0": "no_image", "b/0.tar/0": "no_image"}


def test_workers_and_place_change_neither_tables_nor_fingerprint(tmp_path, monkeypatch):
    for place in ("here", "there"):
        for number in range(3):
            write_tar(tmp_path / place / f"{number}.tar", labelled(5, number * 5))
    monkeypatch.setattr(plan, "POOL_FROM_BYTES", 0)
    reports = [
        ingest(f"{tmp_path}/{place}/*.tar", tmp_path / f"by{workers}", IngestConfig(workers=workers))
        for place, workers in (("here", 1), ("there", 2))
    ]
    assert reports[0].fingerprint == reports[1].fingerprint
    assert shards_of(tmp_path / "by1") == shards_of(tmp_path / "by2")
    again = ingest(f"{tmp_path}/here/*.tar", tmp_path / "by1", IngestConfig())
    assert (again.shards_written, again.shards_kept) == (0, 3)


def test_members_are_grouped_up_to_the_first_dot_whatever_lies_beside_the_image(tmp_path):
    image = encoded(picture(0))
    write_tar(tmp_path / "a.tar", [
        ("__meta__/a.json", b"{}"), ("d/one.JPG", image), ("d/one.mask.png", encoded(picture(1), "PNG")),
        ("d/one.json", b'{"label": 4}'),
        ("d/two.json", b'{"label": 2, "class": "two"}'), ("d/two.left.webp", encoded(picture(2), "WEBP")),
    ])  # fmt: skip
    index = adopted(tmp_path, tmp_path / "a.tar")
    reader = ShardReader(index, "train")
    first, second = reader.read(0, 0), reader.read(0, 1)
    assert (first.key, first.image, first.extension, first.label) == ("d/one", image, "jpg", 4)
    assert (second.key, second.extension, second.label) == ("d/two", "webp", 2)
    assert reader.record(0, 1) == {"label": 2, "class": "two"}
    assert index.classes == ("0", "1", "two", "3", "4")
    assert rejected_of(tmp_path) == {"a.tar/__meta__/a.json": "not_an_image"}


@pytest.mark.parametrize("extension, values, expected, classes", [
    ("json", ['{"class": "b"}', '{"class": "a"}', "[]"], [1, 0, -1], ("a", "b")),
    ("json", ['{"label": "b"}', '{"label": "7"}'.replace("7", "a"), '{"caption": "b"}'], [1, 0, -1], ("a", "b")),
    ("txt", ["2", "0", "1\n"], [2, 0, 1], ("0", "1", "2")),
    ("txt", ["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
    ("txt", ["a dog runs", "cat", "dog"], [-1, -1, -1], None),
    ("caption", ["x", "y", "z"], [-1, -1, -1], None),
])  # fmt: skip
def test_labels_come_from_json_or_from_single_words_of_text(tmp_path, extension, values, expected, classes):
    members = [
        m
        for n, value in enumerate(values)
        for m in ((f"{n}.jpg", encoded(picture(n))), (f"{n}.{extension}", value.encode()))
    ]
    write_tar(tmp_path / "a.tar", members)
    index = adopted(tmp_path, tmp_path / "a.tar")
    assert (labels_of(index), index.classes) == (expected, classes)


def test_the_names_of_tars_or_their_folders_say_the_split(tmp_path):
    for name in ("imagenet-train-00.tar", "imagenet-val-00.tar", "test/00.tar", "more.tar"):
        write_tar(tmp_path / "tars" / name, labelled(2))
    index = adopted(tmp_path, tmp_path / "tars/{imagenet-*,test/00,more}.tar")
    assert {split: len(shards) for split, shards in index.splits.items()} == {"train": 2, "validation": 1, "test": 1}


def test_lists_of_tars_say_the_split(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", labelled(2))
    (tmp_path / "list").write_text("1.tar\n")
    index = adopted(tmp_path, tmp_path / "*.tar", splits={"test": tmp_path / "list"})
    assert [shard.location for shard in index.shards("test")] == [str(tmp_path / "1.tar")]


def test_samples_that_cannot_be_used_are_named(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6
    write_tar(tmp_path / "a.tar", [
        *labelled(6), ("lonely.cls", b"1"), ("img.v1.000.jpg", encoded(picture(1))),
        ("img.v1.001.jpg", encoded(picture(2))),
        ("0003.json", b"{}"), ("broken.jpg", encoded(picture(3))[:-200]),
        ("rotated.jpg", encoded(picture(4), exif=rotated)), ("inks.jpg", encoded(picture(4).convert("CMYK"))),
        ("turned.tif", encoded(picture(4), "TIFF", exif=rotated)),
        ("README", b"x"), ("evil.pkl", b"cos\nsystem\n"), ("../../escape.jpg", encoded(picture(5))),
    ])  # fmt: skip
    index = adopted(tmp_path, tmp_path / "a.tar", max_rejected_fraction=0.9)
    assert rejected_of(tmp_path) == {
        "a.tar/lonely": "no_image",
        "a.tar/img": "several_images",
        "a.tar/0003": "split_sample",
        "a.tar/broken": "broken_image",
        "a.tar/rotated": "needs_rewriting",
        "a.tar/inks": "needs_rewriting",  # decoders disagree about CMYK
        "a.tar/turned": "needs_rewriting",
        "a.tar/README": "not_an_image",
        "a.tar/evil": "no_image",
    }
    assert index.num_samples("train") == 7  # nothing is ever unpacked, so a path that climbs is only a name
    assert check_dataset(tmp_path / "dataset", full=True) == []


def test_too_many_unusable_samples_stop_before_anything_is_published(tmp_path):
    write_tar(tmp_path / "a.tar", [*labelled(3), ("lonely.cls", b"1")])
    with pytest.raises(IngestError, match="25.00%.*1 no_image"):
        adopted(tmp_path, tmp_path / "a.tar")
    assert not (tmp_path / "dataset/index.json").exists()


def test_a_tar_cut_anywhere_is_refused_and_nothing_is_written(tmp_path):
    content = write_tar(tmp_path / "whole.tar", labelled(4)).read_bytes()
    data_end = len(content.rstrip(b"\0"))
    for size in [*range(512, data_end, 512), *range(513, data_end, 1111)]:
        (tmp_path / "cut.tar").write_bytes(content[:size])
        with pytest.raises(InputError, match="cut.tar"):
            adopted(tmp_path, tmp_path / "cut.tar")
    assert not (tmp_path / "dataset").exists()


def test_a_damaged_header_does_not_end_a_tar_silently(tmp_path):
    content = bytearray(write_tar(tmp_path / "a.tar", labelled(4)).read_bytes())
    at = content.index(b"0002.jpg")
    content[at : at + 400] = b"x" * 400
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match="damaged.*after `0001.cls`"):
        adopted(tmp_path, tmp_path / "a.tar")


@pytest.mark.parametrize("members, words", [
    ([], "no samples"),
    ([("a.jpg", b"x"), ("a.JPG", b"x")], "in it twice"),
    ([("a.jpg", b"x"), ("a.cls", b"1"), ("b.jpg", b"x"), ("b.cls", b"cat")], "integer labels and also class names"),
    ([("a.jpg", b"x"), ("a.cls", b"-1")], "must be 0.."),
    ([("a.jpg", b"x"), ("a.cls", b"1000000")], "must be 0.."),
])  # fmt: skip
def test_tars_that_make_no_sense_are_input_errors(tmp_path, members, words):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=words):
        adopted(tmp_path, tmp_path / "a.tar")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("source, config, words", [
    ("{0..2}.tar", {}, "1.tar: no such tar"),
    ("none-*.tar", {}, "no such tar"),
    ("0.tar.gz", {}, "no such tar"),
    ("0.tar", {"splits": "hash"}, "an adopted tar belongs to one split.*tars=rewrite"),
    ("0.tar", {"labels": "labels.csv"}, "adopted tars carry.*tars=rewrite"),
])  # fmt: skip
def test_what_cannot_be_adopted_says_why(tmp_path, source, config, words):
    write_tar(tmp_path / "0.tar", labelled(1))
    with pytest.raises(InputError, match=words):
        adopted(tmp_path, tmp_path / source, **config)
    assert not (tmp_path / "dataset").exists()
