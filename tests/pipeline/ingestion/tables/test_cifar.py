"""CIFAR's binary batches and pickles: every pixel and label, and no pickle ever runs."""

import os
import pickle
import pickletools

import numpy as np
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.shards.index import read_index
from tests.pipeline.ingestion.tables.idx_files import samples
from tests.pipeline.ingestion.test_build import rejected_of

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def planes(number: int, count: int) -> np.ndarray:
    """(count, 3072), as in a batch."""
    return np.random.default_rng(number).integers(0, 256, (count, 3072), dtype=np.uint8)


def binary(pixels: np.ndarray, *labels: list[int]) -> bytes:
    return np.concatenate([*(np.array(column, np.uint8)[:, None] for column in labels), pixels], axis=1).tobytes()


def python2(content: object) -> bytes:
    """A pickle as CIFAR's authors made it, by Python 2: protocol 2, and every text and array as a string of bytes."""

    class Old(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)

        def save_bytes(self, value: bytes) -> None:
            length = len(value)
            head = (
                pickle.SHORT_BINSTRING + bytes([length])
                if length < 256
                else pickle.BINSTRING + length.to_bytes(4, "little")
            )
            self.write(head + value)

        dispatch[bytes] = save_bytes
        dispatch[str] = lambda self, value: self.save_bytes(value.encode())

    import io

    buffer = io.BytesIO()
    Old(buffer, 2).dump(content)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar10(folder, form: str) -> dict[str, np.ndarray]:
    """Two batches of six and one of four, labels 0 to 5 and 0 to 3."""
    folder.mkdir(parents=True)
    batches = {"data_batch_1": planes(1, 6), "data_batch_2": planes(2, 6), "test_batch": planes(3, 4)}
    for name, pixels in batches.items():
        labels = list(range(len(pixels)))
        if form == "binary":
            (folder / f"{name}.bin").write_bytes(binary(pixels, labels))
        else:
            names = [f"picture_s_{number:06d}.png" for number in labels]
            content = {"batch_label": name, "labels": labels, "data": pixels, "filenames": names}
            (folder / name).write_bytes(python2(content) if form == "python" else pickle.dumps(content, 2))
    if form == "binary":
        (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    else:
        (folder / "batches.meta").write_bytes(python2({"label_names": NAMES, "num_vis": 3072}))
    (folder / "readme.html").write_text("<html>")
    return {f"{name}.bin" if form == "binary" else name: pixels for name, pixels in batches.items()}


def ingested(tmp_path, **config):
    ingest(str(tmp_path / "cifar"), tmp_path / "dataset", IngestConfig(**config))
    return read_index(tmp_path / "dataset")


@pytest.mark.parametrize("form", ["binary", "python", "python 3"])
def test_cifar10_keeps_pixels_labels_names_and_splits(tmp_path, form):
    batches = write_cifar10(tmp_path / "cifar/cifar-10-batches", form)
    index = ingested(tmp_path)
    assert index.classes == tuple(NAMES)
    found = samples(index)
    assert len(found) == 16
    for source, (split, label, image) in found.items():
        folder, batch, number, *name = source.split("/")
        assert np.array_equal(image, batches[batch][int(number)].reshape(3, 32, 32).transpose(1, 2, 0))
        assert label == int(number)
        assert split == ("test" if batch.startswith("test") else "train")
        assert name == ([] if form == "binary" else [f"picture_s_{number}.png"])
    assert {entry["path"].rsplit("/")[-1] for entry in rejected_of(tmp_path / "dataset")} == {
        "readme.html",
        "batches.meta.txt" if form == "binary" else "batches.meta",
    }


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("label_column, classes, expected", [
    (None, ("apple", "bear", "boy"), [2, 1, 0, 2]),
    ("coarse_label", ("fruit", "animal"), [1, 1, 0, 1]),
])  # fmt: skip
def test_cifar100_has_fine_labels_unless_coarse_ones_are_asked_for(tmp_path, form, label_column, classes, expected):
    folder, pixels = tmp_path / "cifar", planes(1, 4)
    folder.mkdir()
    fine, coarse = [2, 1, 0, 2], [1, 1, 0, 1]
    for name in ("train", "test"):
        if form == "binary":
            (folder / f"{name}.bin").write_bytes(binary(pixels, coarse, fine))
        else:
            content = {"fine_labels": fine, "coarse_labels": coarse, "data": pixels, "filenames": ["x"] * 4}
            (folder / name).write_bytes(python2(content))
    if form == "binary":
        (folder / "fine_label_names.txt").write_text("apple\nbear\nboy\n")
        (folder / "coarse_label_names.txt").write_text("fruit\nanimal\n")
    else:
        meta = {"fine_label_names": ["apple", "bear", "boy"], "coarse_label_names": ["fruit", "animal"]}
        (folder / "meta").write_bytes(python2(meta))
    index = ingested(tmp_path, label_column=label_column)
    assert index.classes == classes
    labels = {source: label for source, (split, label, _) in samples(index).items() if split == "test"}
    assert [label for _, label in sorted(labels.items())] == expected


def test_without_a_meta_file_classes_are_numbers_and_may_be_named(tmp_path):
    write_cifar10(tmp_path / "cifar", "binary")
    (tmp_path / "cifar/batches.meta.txt").unlink()
    assert ingested(tmp_path).classes == tuple("012345")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    ingest(str(tmp_path / "cifar"), tmp_path / "named", IngestConfig(class_names=tmp_path / "names.txt"))
    assert read_index(tmp_path / "named").classes == tuple(NAMES)


class Runs:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


class Opens:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("bomb", [Runs, Opens])
@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_something_is_refused_and_has_not_run(tmp_path, bomb, name, protocol):
    write_cifar10(tmp_path / "cifar", "python")
    canary = tmp_path / "canary"
    hostile = pickle.dumps({"data": bomb(canary), "labels": [0]}, protocol)
    (tmp_path / "cifar" / name).write_bytes(hostile)
    with pytest.raises(InputError, match=f"{name}: not read, it is no batch of CIFAR or cut .*would run "):
        ingested(tmp_path)
    assert not canary.exists() and not (tmp_path / "dataset").exists()
    pickle.loads(hostile)
    assert canary.exists()  # so the pickle was as hostile as it looks


@pytest.mark.parametrize("names", [
    b"cbuiltins\neval\n", b"cnumpy.core.multiarray\nfromstring\n", b"cnumpy\nload\n", b"cnumpy.f2py\nmain\n",
    b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93", b"\x80\x02\x82\x01",
])  # fmt: skip
def test_no_name_but_those_of_arrays_passes(tmp_path, names):
    write_cifar10(tmp_path / "cifar", "python")
    (tmp_path / "cifar/data_batch_1").write_bytes(names + b".")
    pickletools.dis(names + b".", out=open(os.devnull, "w"))
    with pytest.raises(InputError, match="data_batch_1: not read"):
        ingested(tmp_path)


def test_what_stands_for_numpy_cannot_be_changed_by_a_pickle(tmp_path):
    from pipeline.ingestion.tables import pickles

    write_cifar10(tmp_path / "cifar", "python")
    for module, name in pickles.ALLOWED:
        built = f"c{module}\n{name}\n".encode() + b"N}S'__init__'\nNs\x86b."  # BUILD with (None, {"__init__": None})
        (tmp_path / "cifar/data_batch_1").write_bytes(b"\x80\x02" + built)
        before = {kept: dict(vars(kept)) for kept in pickles.ALLOWED.values()}
        with pytest.raises(InputError):
            ingested(tmp_path)
        assert {kept: dict(vars(kept)) for kept in pickles.ALLOWED.values()} == before


@pytest.mark.parametrize("content, words", [
    ({"labels": [0]}, "data: not an array of N x 3072 bytes"),
    ({"data": planes(1, 2)[:, :99], "labels": [0, 1]}, "data: not an array of N x 3072 bytes"),
    ({"data": planes(1, 2).astype("<f4"), "labels": [0, 1]}, "none of unsigned bytes"),
    ({"data": planes(1, 2)}, "labels: not 2 numbers from 0, one an image"),
    ({"data": planes(1, 2), "labels": [0]}, "labels: not 2 numbers"),
    ({"data": planes(1, 2), "labels": [0, -1]}, "labels: not 2 numbers"),
    ({"data": planes(1, 2), "labels": [0, 10]}, "label 10, and there are 10 names"),
    ([1, 2], "holds a list, not the dict of a batch"),
])  # fmt: skip
def test_a_wrong_python_batch_is_an_input_error(tmp_path, content, words):
    write_cifar10(tmp_path / "cifar", "python")
    (tmp_path / "cifar/data_batch_1").write_bytes(python2(content))
    with pytest.raises(InputError, match=f"data_batch_1: .*{words}"):
        ingested(tmp_path)


@pytest.mark.parametrize("cut", [0, 10, 3000, -1])
@pytest.mark.parametrize("form, name", [("python", "data_batch_1"), ("binary", "data_batch_1.bin")])
def test_a_cut_batch_is_an_input_error(tmp_path, form, name, cut):
    write_cifar10(tmp_path / "cifar", form)
    path = tmp_path / "cifar" / name
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match=f"{name}: .*fetch it again"):
        ingested(tmp_path)


@pytest.mark.parametrize("form, words", [
    ("binary", "label_column: coarse_label: CIFAR-10 has one label"),
    ("folder", "label_column: coarse_label: images in files have no columns; leave the key out"),
])  # fmt: skip
def test_a_column_that_is_not_there_is_an_input_error(tmp_path, form, words):
    if form == "binary":
        write_cifar10(tmp_path / "cifar", "binary")
    else:
        from tests.pipeline.pictures import write_pictures

        write_pictures(tmp_path / "cifar", ["a.png"])
    with pytest.raises(InputError, match=words):
        ingested(tmp_path, label_column="coarse_label")


def test_two_sets_of_cifar_are_not_mixed(tmp_path):
    write_cifar10(tmp_path / "cifar/a", "binary")
    write_cifar10(tmp_path / "cifar/b", "python")
    with pytest.raises(InputError, match="several sets of CIFAR, .*; name the folder of one"):
        ingested(tmp_path)


def test_files_that_are_merely_called_train_are_no_cifar(tmp_path):
    (tmp_path / "cifar").mkdir()
    for name in ("train.bin", "test.bin", "train"):
        (tmp_path / "cifar" / name).write_bytes(bytes(3074))
    with pytest.raises(InputError, match="holds no images among its 3 files"):
        ingested(tmp_path)
