"""Images of several classes each: from a labels file to a trained run, without a single-label dataset changing."""

import json
import tarfile

import numpy as np
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.loading.selection import Selection
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from pipeline.shards.label_sets import LABEL_SETS_NAME, label_matrix
from pipeline.shards.reader import ShardReader
from pipeline.training.loop import initial_module
from tests.pipeline.pictures import small_dataset, write_pictures
from tests.pipeline.training.finetuned import exported, fine_tuning
from tests.pipeline.training.runs import new_run, train_until
from tests.ranks import run_on_ranks

SETS = (["ant"], ["bee", "ant"], [], ["cat"], ["ant", "bee", "cat"], ["bee"])
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}


def several(folder, suffix: str = "jsonl", count: int = 60):
    """A dataset whose image n has the classes SETS[n % 6]."""
    names = [f"{number:03d}.jpg" for number in range(count)]
    write_pictures(folder / "source", names)
    rows = [(name, SETS[number % len(SETS)]) for number, name in enumerate(names)]
    labels = folder / f"labels.{suffix}"
    if suffix == "jsonl":
        labels.write_text("".join(json.dumps({"path": name, "classes": sets}) + "\n" for name, sets in rows))
    else:
        labels.write_text("path,labels\n" + "".join(f"{name},{'; '.join(sets)}\n" for name, sets in rows))
    config = IngestConfig(labels=labels, samples_per_shard=7, splits="hash", split_fractions=SPLITS)
    ingest(str(folder / "source"), folder / "dataset", config)
    return folder / "dataset"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return several(tmp_path_factory.mktemp("several"))


def records(directory) -> list[dict]:
    found = []
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    return found


def test_every_distinct_set_is_a_label_and_the_samples_list_their_classes(dataset):
    index = read_index(dataset)
    assert index.classes == ("ant", "bee", "cat")
    assert index.label_sets == ((), (0,), (0, 1), (0, 1, 2), (1,), (2,))
    assert (index.num_labels, index.labelled) == (6, True)
    expected = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]], bool)
    assert (index.label_matrix() == expected).all()
    labels, classes = index.classes_of_labels()
    assert list(zip(labels, classes, strict=True)) == list(zip(*np.nonzero(expected), strict=True))
    said = json.loads((dataset / "certificate.json").read_text())["classes"]
    assert [sum(one[split] for split in index.splits) for one in said] == [30, 30, 20]
    found = records(dataset)
    assert len(found) == 60
    for record in found:
        assert record["classes"] == sorted(SETS[int(record["source"][:3]) % 6]) and "class" not in record
        assert [index.classes[number] for number in index.label_sets[record["label"]]] == record["classes"]
    stored = {(r["source"], r["label"]) for r in found}
    assert len({label for _, label in stored}) == 6


def test_an_empty_cell_is_no_label_and_an_empty_list_is_none_of_the_classes(tmp_path, dataset):
    index = read_index(several(tmp_path, "csv"))
    assert index.label_sets == ((0,), (0, 1), (0, 1, 2), (1,), (2,))
    assert sum(index.num_unlabelled(split) for split in index.splits) == 10
    assert read_index(dataset).num_unlabelled("train") == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"path": "000.jpg", "classes": ["a", "a"]}', r"classes \['a', 'a'\]: expected integers"),
        ('{"path": "000.jpg", "classes": [1.5]}', "expected integers from 0"),
        ('{"path": "000.jpg", "classes": [-1]}', "expected integers from 0"),
        ('{"path": "000.jpg", "classes": {"a": 1}}', "expected integers from 0"),
        ('{"path": "000.jpg", "classes": ["a"], "label": 3}', "one of classes and labels alone; it has"),
        ('{"path": "000.jpg", "classes": []}', "no row of a file in the source names a class"),
        ('{"path": "nowhere.jpg", "classes": ["a"]}', "nowhere.jpg: no such file in the source"),
    ],
)  # fmt: skip
def test_a_row_that_makes_no_sense_is_a_line(tmp_path, text, line):
    write_pictures(tmp_path / "source", ["000.jpg", "001.jpg"])
    (tmp_path / "labels.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match=line):
        ingest(str(tmp_path / "source"), tmp_path / "dataset", IngestConfig(labels=tmp_path / "labels.jsonl"))
    assert not (tmp_path / "dataset").exists()


def test_the_same_labels_give_the_same_dataset_and_others_another_fingerprint(tmp_path, dataset):
    again = several(tmp_path / "again")
    assert read_index(again).fingerprint == read_index(dataset).fingerprint
    assert (again / LABEL_SETS_NAME).read_bytes() == (dataset / LABEL_SETS_NAME).read_bytes()
    others = several(tmp_path / "others", count=59)
    assert read_index(others).fingerprint != read_index(dataset).fingerprint


def test_check_finds_sets_that_are_missing_changed_or_not_those_of_the_samples(tmp_path):
    dataset = several(tmp_path)
    assert check_dataset(dataset, full=False) == check_dataset(dataset, full=True) == []
    path = dataset / LABEL_SETS_NAME
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[2]", b"[1]"))
    assert "label-sets.json: changed" in check_dataset(dataset, full=False)[0]
    path.unlink()
    assert "label-sets.json: missing" in check_dataset(dataset, full=False)[0]
    path.write_bytes(content)
    index = json.loads((dataset / "index.json").read_text())
    index["classes"] = ["ant", "bee", "cow"]
    del index["checksum"], index["provenance"]["certificate"]  # as before there were any
    for name in ("certificate.json", "certificate.html"):
        (dataset / name).unlink()
    (dataset / "index.json").write_text(json.dumps(index))
    assert any("its .json says classes" in fault for fault in check_dataset(dataset, full=True))
    del index["label_sets"]
    (dataset / "index.json").write_text(json.dumps(index | {"format_version": 1}))
    assert any("holds label 5, the index has 3 classes" in fault for fault in check_dataset(dataset, full=False))


def test_a_dataset_of_single_labels_is_written_as_ever(tmp_path):
    directory = small_dataset(tmp_path).directory
    content = json.loads((directory / "index.json").read_text())
    assert content["format_version"] == 1 and "label_sets" not in content
    assert not (directory / LABEL_SETS_NAME).exists()
    assert (read_index(directory).label_matrix() == np.eye(2, dtype=bool)).all()
    assert (label_matrix(None, 3) == np.eye(3, dtype=bool)).all()


def test_tars_whose_images_have_several_classes_are_not_adopted(tmp_path, dataset):
    with pytest.raises(InputError, match="lists `classes`, and tars whose images have several are not taken"):
        ingest(str(dataset / "train-*.tar"), tmp_path / "adopted", IngestConfig())


def test_a_share_of_the_labels_is_of_all_samples_and_not_of_every_set(dataset):
    reader = ShardReader(read_index(dataset), "train")
    total = int(reader.shard_sizes.sum())
    assert Selection.of(reader, 0.1).shard_sizes.sum() == round(0.1 * total) < 6


def test_losses_that_know_one_class_and_mixtures_are_refused(tmp_path, dataset):
    model = exported(tmp_path / "model", ("a", "b"))
    with pytest.raises(InputError, match="have several classes each, and a softmax learns one; set objective.loss=sig"):
        fine_tuning(tmp_path / "1", dataset, model)
    with pytest.raises(InputError, match="and distill learns one; set objective.kind=supervised and objective.loss"):
        teacher = exported(tmp_path / "teacher", ("ant", "bee", "cat"))
        fine_tuning(tmp_path / "2", dataset, model, "objective.kind=distill", f"objective.teacher={teacher}")
    single = small_dataset(tmp_path / "single").directory
    with pytest.raises(InputError, match="is not mixed with others to learn labels from"):
        new_run(
            tmp_path / "3", [str(dataset), str(single)], "objective.loss=sigmoid", recipe="pretrain_supervised_debug"
        )
    new_run(tmp_path / "4", [str(dataset), str(single)])  # a masked autoencoder reads no labels


@pytest.mark.slow
def test_a_fine_tune_learns_several_classes_of_an_image_on_two_ranks_with_mixup(tmp_path, dataset):
    model = exported(tmp_path / "model", ("a", "b"))
    run = fine_tuning(
        tmp_path / "run", dataset, model, "objective.loss=sigmoid", "objective.head_bias=-1", "steps=60",
        "optimizer.learning_rate=0.003", "optimizer.warmup=3", "augmentation.rand_augment_layers=0",
        "augmentation.erase_probability=0", "augmentation.mixup_alpha=0.2", "augmentation.cutmix_alpha=0.2",
        "augmentation.crop=whole", "augmentation.flip=false", "objective.label_smoothing=0",
        "profile.ranks_per_node=2", "global_batch_size=36", "micro_batch_size=18", "encoder.drop_path_rate=0",
        "optimizer.layer_decay=1", "data.split=train",
    )  # fmt: skip
    assert run_on_ranks(train_until, 2, str(run.path), 1, 99) == ["done", "done"]
    lines = [json.loads(line) for line in (run.path / "attempts/01/metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert run.plan()["num_classes"] == 3 and losses[-1] < 0.75 * losses[0]


def test_the_module_of_a_run_knows_the_sets_and_its_checkpoints_do_not_hold_them(tmp_path, dataset):
    run = fine_tuning(tmp_path / "run", dataset, exported(tmp_path / "model", ("a", "b")), "objective.loss=sigmoid")
    module = initial_module(read_run_config(run.path), run.plan())
    assert module.members[3].tolist() == [0, 1, 2] and module.members[0].tolist() == [3, 3, 3]
    assert "members" not in module.state_dict()
