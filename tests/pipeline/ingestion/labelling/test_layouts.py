"""Folders that publishers name in their own ways: kept as splits, asked about, or said to be left out."""

import json
import shutil

import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.shards.index import read_index
from tests.pipeline.pictures import write_pictures


def rejected(tmp_path):
    lines = (tmp_path / "dataset/rejected.jsonl").read_text().splitlines()
    return {entry["path"]: (entry["reason"], entry["detail"]) for entry in map(json.loads, lines)}


def made(tmp_path, names, **config):
    """(images by split, classes, verdict)"""
    source = write_pictures(tmp_path / "source", names)
    ingest(str(source), tmp_path / "dataset", IngestConfig(workers=1, **config))
    index = read_index(tmp_path / "dataset")
    verdict = json.loads((tmp_path / "dataset/certificate.json").read_text())["verdict"]
    return {split: index.num_samples(split) for split in index.splits}, index.classes, verdict


@pytest.mark.parametrize("train, validation, test", [
    ("Train", "Val", "Test"), ("training", "DEV", "testing"), ("TRAIN", "eval", "Testing"),
])  # fmt: skip
@pytest.mark.parametrize("below", [False, True])
def test_folders_of_splits_go_by_any_usual_name(tmp_path, train, validation, test, below):
    folders = [(split, name) for split in (train, validation, test) for name in ("ant", "bee")]
    names = [f"{name}/{split}/1.jpg" if below else f"{split}/{name}/1.jpg" for split, name in folders]
    splits, classes, verdict = made(tmp_path, names)
    assert splits == {"train": 2, "validation": 2, "test": 2} and classes == ("ant", "bee")
    assert any("folders below the classes" in note for note in verdict["notes"]) == below


@pytest.mark.parametrize("names, words", [
    (["train2017/1.jpg", "val2017/2.jpg"], "train2017, val2017 look like splits"),
    (["Train_Images/a/1.jpg", "test-images/a/2.jpg"], "Train_Images, test-images look like splits"),
    (["ant/train/1.jpg", "ant/test/2.jpg", "bee/3.jpg"], "ant/test, ant/train look like splits, but bee/3.jpg is in"),
])  # fmt: skip
def test_what_looks_like_splits_is_asked_about_unless_hash_is_said(tmp_path, names, words):
    with pytest.raises(InputError, match=words):
        made(tmp_path, names)
    assert not (tmp_path / "dataset").exists()
    made(tmp_path, names, splits="hash")


def test_images_beside_the_folders_of_splits_are_a_finding(tmp_path):
    names = ["train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "extra/4.jpg", "extra/5.jpg", "6.jpg"]
    _, _, verdict = made(tmp_path, names)
    assert not verdict["sound"]
    assert "2 images in the folder extra beside the split folders left out" in verdict["findings"]
    assert "1 image in no folder beside the split folders left out" in verdict["findings"]


def test_a_dataset_of_train_alone_has_a_note(tmp_path):
    splits, _, verdict = made(tmp_path, ["train/a/1.jpg", "train/b/2.jpg"])
    assert splits == {"train": 2} and any("no validation and no test split" in note for note in verdict["notes"])


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_folders_are_no_classes_and_count_for_nothing(tmp_path, packed):
    names = ["a/1.jpg", "b/2.jpg", "b/.3.jpg", ".git/x.jpg", "a/.cache/y.jpg"]
    source = write_pictures(tmp_path / "source", names)
    if packed:
        source = shutil.make_archive(str(tmp_path / "source"), "zip", source)
    ingest(str(source), tmp_path / "dataset", IngestConfig(workers=1))
    assert read_index(tmp_path / "dataset").classes == ("a", "b")
    assert {path: why[0] for path, why in rejected(tmp_path).items()} == {
        ".git/x.jpg": "hidden",
        "a/.cache/y.jpg": "hidden",
    }


def test_a_source_of_hidden_folders_alone_says_so(tmp_path):
    with pytest.raises(InputError, match="2 in hidden folders"):
        made(tmp_path, [".x/1.jpg", ".x/2.jpg"])


def test_a_link_to_a_folder_that_holds_it_is_no_lost_image(tmp_path):
    source = write_pictures(tmp_path / "source", ["a/1.jpg", "b/2.jpg"])
    (source / "a/loop").symlink_to(source)
    ingest(str(source), tmp_path / "dataset", IngestConfig(workers=1, max_rejected_fraction=0))
    assert [why[0] for why in rejected(tmp_path).values()] == ["repeated_link"]


@pytest.mark.parametrize("name, content, words", [
    ("x.ico", b"\0\0\1\0\1\0", "an icon"),
    ("x.svg", b"<svg/>", "SVG"),
    ("x.heic", b"\0\0\0\x18ftypheic", "HEIC; convert it"),
    ("x.raf", b"FUJIFILMCCD-RAW ", "camera's raw file"),
])  # fmt: skip
def test_pictures_in_forms_that_are_not_read_count_and_say_what_to_do(tmp_path, name, content, words):
    source = write_pictures(tmp_path / "source", ["a/1.jpg", "b/2.jpg"])
    (source / "a" / name).write_bytes(content)
    ingest(str(source), tmp_path / "dataset", IngestConfig(workers=1, max_rejected_fraction=0.9))
    reason, detail = rejected(tmp_path)[f"a/{name}"]
    assert reason == "unknown_format" and words in detail
