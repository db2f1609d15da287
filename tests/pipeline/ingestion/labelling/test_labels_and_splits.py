"""Labels and splits come from folders or files, and what does not fit is said before anything is written."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.pipeline.pictures import encoded, picture, write_pictures

ALL_TRAIN = {"train": 1.0}


def ingested(tmp_path, source, **config):
    ingest(str(source), tmp_path / "dataset", IngestConfig(**config))
    return read_index(tmp_path / "dataset")


def contents(index):
    """source -> (split, label)"""
    found = {}
    for split in index.splits:
        reader = ShardReader(index, split)
        for shard, size in enumerate(reader.shard_sizes):
            for sample in range(size):
                found[reader.record(shard, sample)["source"]] = (split, reader.read(shard, sample).label)
    return found


@pytest.fixture
def flat(tmp_path):
    return write_pictures(tmp_path / "flat", ["a.jpg", "b.jpg", "sub/c.png"])


@pytest.mark.parametrize("name, text", [
    ("labels.csv", "path,label\na.jpg,cat\nb.jpg,dog\nsub/c.png,cat\n"),
    ("labels.csv", "id,class\na,cat\nb,dog\nc,cat\n"),
    ("labels.csv", '\ufefffilename,source,label\n"a.jpg",web,cat\n./b.jpg,web,dog\nc.png,web,cat\n'),
    ("labels.tsv", "image\tlabel\na\tcat\nb\tdog\nsub/c\tcat\n"),
    ("labels.jsonl", '{"id": "a", "label": "cat"}\n{"id": "b", "label": "dog"}\n\n{"id": "c", "label": "cat"}\n'),
])  # fmt: skip
def test_a_labels_file_names_files_by_path_name_or_id(tmp_path, flat, name, text):
    (tmp_path / name).write_text(text)
    index = ingested(tmp_path, flat, labels=tmp_path / name, split_fractions=ALL_TRAIN)
    assert index.classes == ("cat", "dog") and index.labelled
    assert contents(index) == {"a.jpg": ("train", 0), "b.jpg": ("train", 1), "sub/c.png": ("train", 0)}


@pytest.mark.parametrize("at, rows", [
    ("labels.csv", "{flat}/a.jpg,cat\n{flat}/b.jpg,dog\n{flat}/sub/c.png,cat\n"),
    ("labels.csv", "a.jpg,cat\nb.jpg,dog\nsub\\c.png,cat\n"),
    ("labels.csv", "flat/a.jpg,cat\nflat\\b.jpg,dog\nflat/sub/c,cat\n"),  # relative to the list's own folder
    ("lists/labels.csv", "../flat/a.jpg,cat\n..\\flat\\b.jpg,dog\n./sub/c.png,cat\n"),
])  # fmt: skip
def test_rows_may_be_absolute_of_windows_or_relative_to_their_list(tmp_path, flat, at, rows):
    (tmp_path / at).parent.mkdir(exist_ok=True)
    (tmp_path / at).write_text("path,label\n" + rows.format(flat=flat))
    index = ingested(tmp_path, flat, labels=tmp_path / at, split_fractions=ALL_TRAIN)
    assert contents(index) == {"a.jpg": ("train", 0), "b.jpg": ("train", 1), "sub/c.png": ("train", 0)}


def test_an_absolute_row_of_another_folder_is_no_file_of_the_source(tmp_path, flat):
    (tmp_path / "labels.csv").write_text("path,label\n/elsewhere/a.jpg,cat\n")
    with pytest.raises(InputError, match="labels.csv: /elsewhere/a.jpg: no such file in the source"):
        ingested(tmp_path, flat, labels=tmp_path / "labels.csv")


def test_one_file_under_two_names_has_one_label(tmp_path, flat):
    (tmp_path / "labels.csv").write_text(f"path,label\na.jpg,cat\n{flat}/a.jpg,dog\n")
    with pytest.raises(InputError, match="a.jpg has another row that says otherwise"):
        ingested(tmp_path, flat, labels=tmp_path / "labels.csv")


def test_split_lists_may_hold_absolute_paths(tmp_path, flat):
    (tmp_path / "train.txt").write_text(f"{flat}/a.jpg\n{flat}/sub/c.png\n")
    (tmp_path / "test.txt").write_text(f"{flat}/b.jpg\n")
    index = ingested(tmp_path, flat, splits={"train": tmp_path / "train.txt", "test": tmp_path / "test.txt"})
    assert {source: split for source, (split, _) in contents(index).items()} == {
        "a.jpg": "train",
        "sub/c.png": "train",
        "b.jpg": "test",
    }


@pytest.mark.parametrize("trained", [True, False])
def test_imagenets_flat_validation_takes_its_labels_from_a_file(tmp_path, trained):
    """As unpacked from the tars: a folder per wnid in train, which the file need not name, and a flat val."""
    names = [f"train/{wnid}/{wnid}_{number}.JPEG" for wnid in ("n01440764", "n01443537") for number in range(3)]
    validation = [f"val/ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
    source = write_pictures(tmp_path / "imagenet", [*names, *validation])
    rows = [f"{name.rsplit('/')[-1]},{name.split('/')[1]}" for name in names if trained]
    rows += [f"ILSVRC2012_val_{number:08d},{('n01443537', 'n01440764')[number % 2]}" for number in range(1, 5)]
    (tmp_path / "labels.csv").write_text("id,class\n" + "\n".join(rows))
    index = ingested(tmp_path, source, labels=tmp_path / "labels.csv")
    found = contents(index)
    assert index.classes == ("n01440764", "n01443537")
    assert [found[name] for name in validation] == [("validation", number % 2 ^ 1) for number in range(1, 5)]
    assert [found[name] for name in names] == [("train", 0)] * 3 + [("train", 1)] * 3


def test_a_labels_file_for_a_part_of_a_split_leaves_the_rest_unlabelled(tmp_path):
    source = write_pictures(tmp_path / "set", [f"train/{name}/{number}.jpg" for name in "ab" for number in range(3)])
    (tmp_path / "labels.csv").write_text("path,class\ntrain/a/0.jpg,a\ntrain/b/0.jpg,b\n")
    found = contents(ingested(tmp_path, source, labels=tmp_path / "labels.csv"))
    assert sorted(label for _, label in found.values()) == [-1, -1, -1, -1, 0, 1]


def test_integer_labels_of_a_file_may_be_named(tmp_path, flat):
    (tmp_path / "labels.csv").write_text("id,label\na,0\nb,2\nc,0\n")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    index = ingested(tmp_path, flat, labels=tmp_path / "labels.csv", class_names=tmp_path / "names.txt")
    assert index.classes == ("ant", "bee", "cat", "dog")


def test_integer_labels_stay_what_they_are(tmp_path, flat):
    (tmp_path / "labels.csv").write_text("id,label\na,0\nb,10\nc,9\n")
    index = ingested(tmp_path, flat, labels=tmp_path / "labels.csv", split_fractions=ALL_TRAIN)
    assert contents(index) == {"a.jpg": ("train", 0), "b.jpg": ("train", 10), "sub/c.png": ("train", 9)}
    assert index.num_classes == 11


def test_images_without_a_row_are_unlabelled(tmp_path, flat):
    (tmp_path / "labels.csv").write_text("id,label\na,cat\nb,\n")
    index = ingested(tmp_path, flat, labels=tmp_path / "labels.csv", split_fractions=ALL_TRAIN)
    assert not index.labelled
    assert [label for _, label in sorted(contents(index).values())] == [-1, -1, 0]


def test_a_row_for_a_file_that_is_no_image_is_not_a_mistake(tmp_path, flat):
    (flat / "a.txt").write_text("beside a.jpg")
    (flat / "notes.txt").write_text("x")
    (tmp_path / "labels.csv").write_text("id,label\na,cat\nb,dog\nc,cat\nnotes,cat\n")
    assert ingested(tmp_path, flat, labels=tmp_path / "labels.csv", split_fractions=ALL_TRAIN).labelled


@pytest.mark.parametrize("name, text, words", [
    ("labels.csv", None, "cannot be read"),
    ("labels.csv", "", "holds no rows"),
    ("labels.csv", "id,label\na,cat\nz,dog\n", "labels.csv: z: no such file"),
    ("labels.csv", "id,label\na,cat\na,dog\n", "labels.csv:3: a: label 'dog', but 'cat' in an earlier row"),
    ("labels.csv", "id,species\na,cat\n", "none of the columns class, label; it has: id, species"),
    ("labels.csv", "one,label\na,cat\n", "none of the columns path"),
    ("labels.txt", "a cat", "is not one of .csv, .tsv, .jsonl"),
    ("labels.jsonl", "{", "labels.jsonl:1: not valid JSON"),
    ("labels.jsonl", '{"id": "a", "label": 0.5}', "an integer from 0"),
    ("labels.csv", "id,label\na,0\nb,-1\n", "an integer from 0"),
    ("labels.csv", "id,label\na,0.0\nb,\n", "an integer from 0"),
    ("labels.csv", b"id,label\na,\xff\n", "not UTF-8"),
])  # fmt: skip
def test_a_wrong_labels_file_is_an_input_error_and_nothing_is_written(tmp_path, flat, name, text, words):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        ingested(tmp_path, flat, labels=tmp_path / name)
    assert not (tmp_path / "dataset").exists()


def test_a_row_that_names_two_files_is_an_input_error(tmp_path):
    source = write_pictures(tmp_path / "source", ["x/a.jpg", "y/a.jpg"])
    (tmp_path / "labels.csv").write_text("id,label\na,cat\n")
    with pytest.raises(InputError, match="a: names 2 files, .*/a.jpg and ./a.jpg; write the path"):
        ingested(tmp_path, source, labels=tmp_path / "labels.csv")


def test_many_wrong_rows_make_few_lines(tmp_path, flat):
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"z{number},1\n" for number in range(500)))
    with pytest.raises(InputError) as caught:
        ingested(tmp_path, flat, labels=tmp_path / "labels.csv")
    assert len(caught.value.problems) == 9 and "492 more" in caught.value.problems[-1]


def test_top_level_folders_named_as_splits_are_the_splits(tmp_path):
    names = [
        f"{split}/{name}/{number}.jpg"
        for split in ("train", "val", "test")
        for name in ("ant", "bee")
        for number in range(2)
    ]
    source = write_pictures(tmp_path / "source", [*names, "extra/1.jpg"])
    index = ingested(tmp_path, source)
    assert {split: index.num_samples(split) for split in index.splits} == {"train": 4, "validation": 4, "test": 4}
    assert index.classes == ("ant", "bee")
    assert all(
        found == (split.replace("val/", "validation/").split("/")[0], int("bee" in split))
        for split, found in contents(index).items()
    )
    assert json.loads((tmp_path / "dataset/rejected.jsonl").read_text())["reason"] == "outside_splits"


def test_wrapping_folders_are_looked_through(tmp_path):
    names = [f"download/pictures/{name}/{number}.jpg" for name in ("ant", "bee") for number in range(4)]
    source = write_pictures(tmp_path / "source", names)
    assert ingested(tmp_path, source).classes == ("ant", "bee")


@pytest.mark.parametrize("names, classes", [
    (["a.jpg", "b.jpg"], None),
    (["images/a.jpg", "images/b.jpg"], None),
    (["train/a.jpg", "test/b.jpg"], None),
    (["train/ant/a.jpg", "train/bee/b.jpg", "val/images/c.jpg"], ("ant", "bee")),
    (["train/ant/a.jpg", "train/bee/b.jpg", "val/bee/c.jpg"], ("ant", "bee")),
])  # fmt: skip
def test_one_folder_alone_is_no_class(tmp_path, names, classes):
    index = ingested(tmp_path, write_pictures(tmp_path / "source", names))
    assert index.classes == classes
    assert index.labelled == (classes is not None and "val/images/c.jpg" not in names)


def test_equal_files_are_never_in_two_splits(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(60):
        for copy in ("a", "b", "c"):
            (source / f"{number}{copy}.jpg").write_bytes(encoded(picture(number)))
    index = ingested(tmp_path, source, splits="hash", split_fractions={"train": 0.5, "test": 0.5})
    found = contents(index)
    assert all(found[f"{number}a.jpg"] == found[f"{number}b.jpg"] == found[f"{number}c.jpg"] for number in range(60))
    assert 60 < index.num_samples("train") < 120


def test_split_lists_choose_the_images_of_each_split(tmp_path):
    source = write_pictures(
        tmp_path / "source", [f"all/{name}/{number}.jpg" for name in ("ant", "bee") for number in range(3)]
    )
    (tmp_path / "train.txt").write_text("ant/0.jpg\nbee/0.jpg\n\n")
    (tmp_path / "test.txt").write_text("ant/1\n")
    index = ingested(tmp_path, source, splits={"train": tmp_path / "train.txt", "test": tmp_path / "test.txt"})
    assert contents(index) == {
        "all/ant/0.jpg": ("train", 0),
        "all/bee/0.jpg": ("train", 1),
        "all/ant/1.jpg": ("test", 0),
    }
    assert len((tmp_path / "dataset/rejected.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("train, test, words", [
    ("a.jpg\n", "a.jpg\n", "also in the list of `train`"),
    ("z.jpg\n", "a.jpg\n", "z.jpg: no such file"),
    (None, "a.jpg\n", "splits: cannot be read"),
    ("", "", "not one of its 3 images"),
])  # fmt: skip
def test_wrong_split_lists_are_input_errors(tmp_path, flat, train, test, words):
    for name, text in (("train", train), ("test", test)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=words):
        ingested(tmp_path, flat, splits={"train": tmp_path / "train", "test": tmp_path / "test"})
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("config, words", [
    ({"split_fractions": {"train": 0.9}}, "add up to 0.9"),
    ({"splits": {}}, "mapping is empty"),
    ({"splits": {"holdout": Path("x")}}, "holdout"),
    ({"samples_per_shard": 0}, "samples_per_shard"),
    ({"max_rejected_fraction": 1.5}, "max_rejected_fraction"),
    ({"duplicates": "keep"}, "duplicates"),
])  # fmt: skip
def test_a_wrong_config_is_refused(config, words):
    with pytest.raises(ValidationError, match=words):
        IngestConfig(**config)


@pytest.mark.parametrize("root", ["/home/other/flat/", "C:\\\\Users\\\\other\\\\", "D:/x/"])
def test_absolute_paths_of_another_machine_are_matched_where_the_rest_is_a_whole_path(tmp_path, flat, root):
    root = root.replace("\\\\", "\\")
    slash = "\\" if "\\" in root else "/"
    (tmp_path / "labels.csv").write_text(f"path,label\n{root}a.jpg,cat\n{root}b,dog\n{root}sub{slash}c.png,cat\n")
    found = contents(ingested(tmp_path, flat, labels=tmp_path / "labels.csv", split_fractions=ALL_TRAIN))
    assert found == {"a.jpg": ("train", 0), "b.jpg": ("train", 1), "sub/c.png": ("train", 0)}


@pytest.mark.parametrize("rows", ["/else/train/c.png,cat\n", "/one/a.jpg,cat\n/two/sub/c.png,dog\n"])
def test_names_alone_do_not_match_paths_of_another_machine(tmp_path, flat, rows):
    (tmp_path / "labels.csv").write_text("path,label\n" + rows)
    with pytest.raises(InputError, match="no such file in the source; .* one folder of another machine"):
        ingested(tmp_path, flat, labels=tmp_path / "labels.csv")
