"""Folders of idx files: every image with its label and pixels, and damage said before anything is written."""

import gzip
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion import plan
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.build import ingest
from pipeline.ingestion.opening import list_source
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from tests.pipeline.ingestion.tables.idx_files import idx_bytes, pixels, samples, write_idx
from tests.pipeline.ingestion.test_build import rejected_of
from tests.pipeline.pictures import files_of, write_pictures

TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"


def write_set(folder: Path, suffix: str = "", train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    arrays = {
        f"train-images-idx3-ubyte{suffix}": pixels(1, train),
        f"train-labels-idx1-ubyte{suffix}": np.arange(train, dtype=np.uint8) % 10,
        f"t10k-images-idx3-ubyte{suffix}": pixels(2, test),
        f"t10k-labels-idx1-ubyte{suffix}": np.arange(test, dtype=np.uint8) % 10,
    }
    for name, values in arrays.items():
        write_idx(folder / name, values)
    return arrays


def ingested(tmp_path, source, **config):
    ingest(str(source), tmp_path / "dataset", IngestConfig(**config))
    return read_index(tmp_path / "dataset")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_image_has_its_pixels_label_and_split(tmp_path, suffix):
    arrays = write_set(tmp_path / "mnist", suffix)
    (tmp_path / "mnist/README.txt").write_text("about")
    found = samples(ingested(tmp_path, tmp_path / "mnist"))
    assert len(found) == 30
    for source, (split, label, image) in found.items():
        table, number = source.rsplit("/", 1)
        assert np.array_equal(image, arrays[table][int(number)])
        assert label == int(number) % 10
        assert split == ("train" if table.startswith("train") else "test")
    rejected = {entry["path"]: entry["reason"] for entry in rejected_of(tmp_path / "dataset")}
    labels = (f"train-labels-idx1-ubyte{suffix}", f"t10k-labels-idx1-ubyte{suffix}")
    assert rejected == dict.fromkeys(labels, "read_as_labels") | {"README.txt": "not_an_image"}
    images = json.loads((tmp_path / "dataset/certificate.json").read_text())["images"]
    assert images["formats"] == {"idx": 30} and images["changes"] == {"raw pixels encoded": 30}
    assert check_dataset(tmp_path / "dataset", full=True) == []
    assert not list((tmp_path / "dataset").glob(".unpacked*"))


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "POOL_FROM_BYTES", 0)
    write_set(tmp_path / "mnist", ".gz", train=200)
    for workers in (1, 2):
        config = IngestConfig(workers=workers, samples_per_shard=50)
        ingest(str(tmp_path / "mnist"), tmp_path / str(workers), config)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_a_source_is_small_wherever_it_is_sent(tmp_path):
    write_set(tmp_path / "mnist", ".gz")
    with Scratch(tmp_path / "dataset") as scratch:
        source, listing = list_source(str(tmp_path / "mnist"), IngestConfig(), scratch)
        path, spool = listing.images[0].path, scratch.folder()
        assert [path.name for path in spool.iterdir()] == ["lock"]  # listing writes nothing
        content = source.read(path)
        assert len(pickle.dumps(source)) < 1000
        assert pickle.loads(pickle.dumps(source)).read(path) == content
        unpacked = [path for path in spool.iterdir() if path.suffix != ".lock" and path.name != "lock"]
        assert len(unpacked) == 1 and source.read(path) == content
    assert not (tmp_path / "dataset").exists()


def test_names_of_classes_come_from_a_file(tmp_path):
    write_set(tmp_path / "mnist")
    (tmp_path / "classes.txt").write_text("".join(f"thing {number}\n" for number in range(10)) + "\n")
    index = ingested(tmp_path, tmp_path / "mnist", class_names=tmp_path / "classes.txt")
    assert index.classes == tuple(f"thing {number}" for number in range(10))
    assert "class_names" in index.provenance["made_from"]


@pytest.mark.parametrize("text, words", [
    ("a\nb\n", "classes.txt: class_names: 2 names, but labels go up to 9; write"),
    ("a\nb\nc\nd\ne\nf\ng\nh\ni\na\n", "classes.txt:10: class_names: 'a' is also in line 1"),
    ("a\nb\n\nd\ne\nf\ng\nh\ni\nj\n", "classes.txt:3: class_names: an empty line"),
    (None, "class_names: cannot be read"),
])  # fmt: skip
def test_wrong_class_names_are_an_input_error(tmp_path, text, words):
    write_set(tmp_path / "mnist")
    if text is not None:
        (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match=words):
        ingested(tmp_path, tmp_path / "mnist", class_names=tmp_path / "classes.txt")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("names, words", [
    (["ant/1.png", "bee/2.png"], "the classes have names, such as ant; leave the key out"),
    (["1.png", "2.png"], "has no labels to name; leave the key out"),
])  # fmt: skip
def test_class_names_are_for_numbers_alone(tmp_path, names, words):
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(InputError, match=words):
        ingested(tmp_path, write_pictures(tmp_path / "source", names), class_names=tmp_path / "classes.txt")


@pytest.mark.parametrize("images, labels", [
    ("emnist-letters-train-images-idx3-ubyte.gz", "emnist-letters-train-labels-idx1-ubyte.gz"),
    ("train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
    ("raw/train-images-idx3-ubyte", "raw/train-labels-idx1-ubyte.gz"),
])  # fmt: skip
def test_other_names_of_the_family_are_known(tmp_path, images, labels):
    write_idx(tmp_path / "set" / images, pixels(1, 8))
    write_idx(tmp_path / "set" / labels, np.arange(8, dtype=np.uint8))
    found = samples(ingested(tmp_path, tmp_path / "set"))
    assert sorted(label for _, label, _ in found.values()) == list(range(8))


def test_qmnist_has_its_class_in_the_first_of_many_columns(tmp_path):
    write_idx(tmp_path / "set/qmnist-test-images-idx3-ubyte.gz", pixels(1, 4))
    labels = np.stack([np.full(8, number, ">i4") for number in (3, 1, 0, 2)])
    labels[:, 1:] = 77
    write_idx(tmp_path / "set/qmnist-test-labels-idx2-int.gz", labels.astype(">i4"), kind=0x0C)
    found = samples(ingested(tmp_path, tmp_path / "set"))
    assert {source[-1]: label for source, (_, label, _) in found.items()} == {"0": 3, "1": 1, "2": 0, "3": 2}


@pytest.mark.parametrize("shape, axis", [((6, 5, 3), -1), ((3, 6, 5), 1)])
def test_idx_with_channels_becomes_colour(tmp_path, shape, axis):
    values = pixels(1, 4, *shape)
    write_idx(tmp_path / "set/train-images-idx4-ubyte", values)
    found = samples(ingested(tmp_path, tmp_path / "set"))
    for source, (_, label, image) in found.items():
        assert label == -1
        assert np.array_equal(image, np.moveaxis(values, axis, -1)[int(source[-1])])


def test_a_file_that_is_there_packed_and_unpacked_is_read_once(tmp_path):
    write_set(tmp_path / "raw")
    write_set(tmp_path / "raw", ".gz")
    index = ingested(tmp_path, tmp_path / "raw")
    assert (index.num_samples("train"), index.num_samples("test")) == (20, 10)
    details = {entry["path"]: entry["detail"] for entry in rejected_of(tmp_path / "dataset")}
    assert "lies beside it unpacked" in details[f"{TRAIN}.gz"]


def corrupted(folder: Path, name: str, change) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize("name, change, words", [
    (TRAIN, lambda content: content[:-1], f"{TRAIN}: cut: 599 of the 600 bytes .*20 x 6 x 5.*; fetch it again"),
    (TRAIN, lambda content: content + b"x", f"{TRAIN}: longer than its header says"),
    (TRAIN, lambda content: b"\1" + content[1:], f"{TRAIN}: magic number 01000803; .* begin with 00000803; fetch"),
    (TRAIN, lambda content: content[:9], f"{TRAIN}: ends in its header; fetch it again"),
    (TRAIN, lambda content: b"", f"{TRAIN}: magic number missing"),
    (TRAIN, lambda content: idx_bytes(pixels(1, 2, 3, 7, 9)[:, :2]), f"{TRAIN}: 2 x 2 x 7 x 9 in its header"),
    ("train-labels-idx1-ubyte", lambda content: idx_bytes(np.zeros(19, np.uint8)),
     f"train-labels-idx1-ubyte: 19 labels for the 20 images of {TRAIN}; fetch both again"),
    ("train-labels-idx1-ubyte", lambda content: idx_bytes(np.full(20, 1 << 20, ">i4"), kind=0x0C),
     "train-labels-idx1-ubyte: label 1048576; a label is a number from 0 to 99999"),
    ("train-labels-idx1-ubyte", lambda content: content[:-3], "train-labels-idx1-ubyte: cut"),
])  # fmt: skip
def test_damage_is_said_with_its_fix_and_nothing_is_written(tmp_path, name, change, words):
    write_set(tmp_path / "mnist")
    corrupted(tmp_path / "mnist", name, change)
    with pytest.raises(InputError, match=words) as caught:
        ingested(tmp_path, tmp_path / "mnist")
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize("change", [
    lambda content: content[:-1],
    lambda content: content[: len(content) // 2],
    lambda content: content[:40] + b"\xff\xff\xff" + content[43:],
    lambda content: gzip.decompress(content),
])  # fmt: skip
def test_a_damaged_gz_is_an_input_error(tmp_path, change):
    write_set(tmp_path / "mnist", ".gz")
    corrupted(tmp_path / "mnist", f"{TRAIN}.gz", change)
    with pytest.raises(InputError, match=f"{TRAIN}.gz: .*fetch it again"):
        ingested(tmp_path, tmp_path / "mnist")


def test_sets_that_do_not_belong_together_are_not_mixed(tmp_path):
    for name in ("letters", "digits"):
        write_idx(tmp_path / f"set/emnist-{name}-train-images-idx3-ubyte", pixels(1, 4))
    with pytest.raises(InputError, match="several sets of idx files, emnist-digits and emnist-letters; put each"):
        ingested(tmp_path, tmp_path / "set")


@pytest.mark.parametrize("key", ["label_column", "image_column"])
def test_idx_files_have_no_columns(tmp_path, key):
    write_set(tmp_path / "mnist")
    with pytest.raises(InputError, match=f"{key}: x: idx files have no columns; leave the key out"):
        ingested(tmp_path, tmp_path / "mnist", **{key: "x"})


def test_one_idx_file_is_no_source(tmp_path):
    write_set(tmp_path / "mnist")
    with pytest.raises(InputError, match="one file of several; name its folder, where the labels lie, too"):
        ingested(tmp_path, tmp_path / "mnist" / TRAIN)


def test_idx_files_beside_images_are_not_passed_over(tmp_path):
    write_set(tmp_path / "mnist")
    write_pictures(tmp_path / "mnist", ["photo.jpg"])
    with pytest.raises(InputError, match="holds idx files and images, such as photo.jpg; name a folder with one"):
        ingested(tmp_path, tmp_path / "mnist")


def test_changed_pixels_rewrite_the_shard_that_holds_them(tmp_path):
    arrays = write_set(tmp_path / "mnist", train=60)
    config = IngestConfig(samples_per_shard=10)
    ingest(str(tmp_path / "mnist"), tmp_path / "dataset", config)
    arrays[TRAIN][7] ^= 255
    write_idx(tmp_path / "mnist" / TRAIN, arrays[TRAIN])
    os.utime(tmp_path / "mnist" / TRAIN, ns=(time.time_ns(), time.time_ns() + 10**9))
    report = ingest(str(tmp_path / "mnist"), tmp_path / "dataset", config)
    assert (report.shards_written, report.shards_kept) == (1, 6)
    assert np.array_equal(samples(read_index(tmp_path / "dataset"))[f"{TRAIN}/000007"][2], arrays[TRAIN][7])


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif("VIT_TEST_DATA" not in os.environ, reason="VIT_TEST_DATA is not set")
def test_fashion_mnist_is_taken_whole(tmp_path):
    source = Path(os.environ["VIT_TEST_DATA"]) / "fashion_mnist"
    index = ingested(tmp_path, source, class_names=source / "classes.txt", samples_per_shard=5000)
    assert {split: index.num_samples(split) for split in index.splits} == {"train": 60_000, "test": 10_000}
    assert index.classes[0] == "T-shirt/top" and index.classes[9] == "Ankle boot"
    assert index.statistics.mean[0] == pytest.approx(0.2860, abs=5e-5)  # as published for the training images
    assert index.statistics.std[0] == pytest.approx(0.3530, abs=5e-5)
    assert len(rejected_of(tmp_path / "dataset")) == 5
