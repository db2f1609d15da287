"""What is unlabelled, not taken or not read is in the verdict, and not green."""

import json

import pytest

from flows.control.progress import certificate_lines, ingest_words
from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import ingest
from pipeline.ingestion.plan_notes import shares_of_splits, unread_labels
from pipeline.ingestion.rejected import Rejected
from tests.pipeline.pictures import write_pictures

NAMES = [f"{number:02d}.jpg" for number in range(20)]


def test_images_without_a_label_and_images_not_taken_are_findings_a_line_each(tmp_path):
    source = write_pictures(tmp_path / "source", NAMES)
    for number in range(3):
        (source / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff")
    rows = [f"{name},{'ab'[number % 2]}" for number, name in enumerate(NAMES[:12])]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class", *rows]))
    config = IngestConfig(labels=tmp_path / "labels.csv", split_fractions={"train": 1.0}, max_rejected_fraction=0.9)
    made = ingest(str(source), tmp_path / "dataset", config)
    unlabelled, lost = (
        "8 of the 20 images of train have no label",
        "3 of 23 images could not be taken (3 unknown_format)",
    )
    assert set(made.findings) == {unlabelled, lost}
    lines = certificate_lines(made)
    assert lines[0].endswith("2 findings") and {line.strip() for line in lines[1:]} == {unlabelled, lost}
    assert "2 classes, 8 without a label" in ingest_words(made)
    said = json.loads((tmp_path / "dataset/certificate.json").read_text())
    assert said["statistics"]["weighting"] == "image" and said["images"]["sides"]["width"][0] > 0
    page = (tmp_path / "dataset/certificate.html").read_text()
    assert "each counts the same" in page and "{&#x27;train&#x27;" not in page and "{&quot;train&quot;: 1.0}" in page


def test_files_beside_images_that_may_be_labels_are_noted():
    rejected = [
        Rejected(f"set/{number}{suffix}", "not_an_image", "") for number in range(3) for suffix in (".txt", ".cls")
    ]
    rejected.append(Rejected("README.txt", "not_an_image", ""))
    (note,) = unread_labels(rejected, ["set/0.jpg", "set/1.jpg", "set/2.jpg"], "archive")
    assert "3 .txt, 3 .cls" in note and "tars=rewrite" in note
    assert unread_labels(rejected, ["other.jpg"], None) == []


@pytest.mark.parametrize("groups", [0, 4])
def test_a_split_that_came_out_empty_or_far_off_is_noted(groups):
    splits = {str(number): "train" if number < 80 else "validation" for number in range(100)}
    notes = shares_of_splits(splits, {"train": 0.9, "validation": 0.05, "test": 0.05}, groups)
    assert [note.split(",")[0] for note in notes] == ["validation has 20.0% of the images", "no image is in split test"]
    assert ("4 groups" if groups else "100 images") in notes[0]
