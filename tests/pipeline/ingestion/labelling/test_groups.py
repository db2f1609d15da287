"""Images of one patient, site or video are never in two splits."""

import json

import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.build import ingest
from pipeline.ingestion.labelling import labels
from pipeline.ingestion.plan import plan_ingest
from pipeline.shards.index import read_index
from tests.pipeline.ingestion.labelling.test_labels_and_splits import contents, ingested
from tests.pipeline.pictures import write_pictures

HALVES = {"train": 0.5, "validation": 0.25, "test": 0.25}
NAMES = [f"{site}/patient{patient}_{number}.jpg" for site in "ab" for patient in range(12) for number in range(3)]


def splits_of_patients(index):
    found = {}
    for source, (split, _) in contents(index).items():
        found.setdefault(source.split("patient")[1].split("_")[0], set()).add(split)
    return found


@pytest.mark.parametrize("by", ["pattern", "column"])
def test_a_group_is_in_one_split_and_the_splits_have_about_their_shares(tmp_path, by):
    source = write_pictures(tmp_path / "source", NAMES)
    rows = [f"{name},{name[0]},P{name.split('patient')[1].split('_')[0]}" for name in NAMES]
    (tmp_path / "labels.csv").write_text("\n".join(["path,class,patient", *rows]))
    group = {"pattern": "patient([0-9]+)_", "column": "patient"}[by]
    index = ingested(
        tmp_path, source, splits="hash", split_fractions=HALVES, split={"group": group}, labels=tmp_path / "labels.csv"
    )
    found = splits_of_patients(index)
    assert len(found) == 12 and all(len(splits) == 1 for splits in found.values())
    assert set.union(*found.values()) == set(HALVES) and index.num_samples("train") > 12
    assert index.provenance["made_from"]["split"] == {"group": group}


def test_the_split_of_a_group_does_not_depend_on_the_other_images(tmp_path):
    config = {"splits": "hash", "split_fractions": HALVES, "split": {"group": "patient([0-9]+)"}}
    whole = splits_of_patients(ingested(tmp_path, write_pictures(tmp_path / "source", NAMES), **config))
    few = write_pictures(tmp_path / "few", NAMES[30:48])
    ingest(str(few), tmp_path / "of few", IngestConfig(**config))
    found = splits_of_patients(read_index(tmp_path / "of few"))
    assert found.items() <= whole.items()


def test_folders_and_lists_that_tear_a_group_apart_are_refused(tmp_path):
    names = ["train/x/p1_a.jpg", "train/y/p2_a.jpg", "test/x/p1_b.jpg", "test/y/p3_b.jpg"]
    source = write_pictures(tmp_path / "source", names)
    with pytest.raises(InputError, match="`p1` is in two splits: .*p1_a.jpg in train, .*p1_b.jpg in test|test.*train"):
        ingested(tmp_path, source, split={"group": "(p[0-9])_"})
    assert not (tmp_path / "dataset").exists()
    assert ingested(tmp_path, source, split={"group": "_([ab])"}).num_samples("test") == 2


@pytest.mark.parametrize("group, words", [
    ("patient", "neither a column of a labels file nor a pattern"),
    ("(", "not a regular expression"),
    ("doctor([0-9]+)", "no group of 2 images, such as"),
])  # fmt: skip
def test_a_group_that_means_nothing_is_one_line(tmp_path, group, words):
    source = write_pictures(tmp_path / "source", ["patient1.jpg", "patient2.jpg"])
    with pytest.raises(InputError, match=words) as caught:
        ingested(tmp_path, source, split={"group": group})
    assert len(caught.value.problems) == 1 and not (tmp_path / "dataset").exists()


def test_two_rows_of_a_file_with_two_groups_are_refused_and_numbers_are_groups(tmp_path):
    source = write_pictures(tmp_path / "source", ["1.jpg", "2.jpg"])
    config = {"splits": "hash", "split": {"group": "patient"}, "labels": tmp_path / "labels.jsonl"}
    rows = [("1.jpg", 0, 0), ("2.jpg", 1, 7), ("1.jpg", 0, 0), ("1.jpg", 0, 8)]
    lines = [json.dumps({"path": path, "label": label, "patient": patient}) for path, label, patient in rows]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"labels.jsonl:4: 1.jpg: patient '8', but '0' in an earlier row"):
        ingested(tmp_path, source, **config)
    (tmp_path / "labels.jsonl").write_text("\n".join(lines[:3]))
    assert len(contents(ingested(tmp_path, source, **config))) == 2


def test_the_labels_file_is_read_once(tmp_path, monkeypatch):
    source = write_pictures(tmp_path / "source", ["1.jpg", "2.jpg"])
    (tmp_path / "labels.csv").write_text("path,label,patient\n1.jpg,0,ann\n2.jpg,1,bob\n")
    config = IngestConfig(splits="hash", split={"group": "patient"}, labels=tmp_path / "labels.csv")
    read = []
    monkeypatch.setattr(labels, "_read_text", lambda path, key: read.append(path) or path.read_text())
    assert plan_ingest(str(source), config, Scratch(tmp_path / "dataset")).num_images == 2
    assert read == [tmp_path / "labels.csv"]


def test_an_image_without_a_group_in_its_row_is_named(tmp_path):
    source = write_pictures(tmp_path / "source", ["1.jpg", "2.jpg"])
    (tmp_path / "labels.csv").write_text("path,label,patient\n1.jpg,0,ann\n2.jpg,1,\n")
    with pytest.raises(InputError, match="column `patient` says no group of 1 images, such as 2.jpg"):
        ingested(tmp_path, source, splits="hash", split={"group": "patient"}, labels=tmp_path / "labels.csv")
