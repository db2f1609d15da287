"""CIFAR-10 and CIFAR-100 in the forms their authors publish: binary batches, and pickles of Python.

A record of CIFAR-10 is one byte of label and 3,072 of pixels, red, green and blue planes of 32 x 32; one of CIFAR-100
has two labels, coarse and fine, and the fine one is taken unless `label_column` says `coarse_label`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import xxhash

from pipeline.errors import InputError
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import Listing
from pipeline.ingestion.tables.listing import HASH_BITS, add_row, numbered_classes
from pipeline.ingestion.tables.pickles import read_batch, texts
from pipeline.ingestion.tables.rows import Rows, spooled

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
FORMS = {  # of the files' names without a folder -> (form, bytes of label of a record)
    r"data_batch_\d+\.bin|test_batch\.bin": ("cifar10-binary", 1),
    r"(?:train|test)\.bin": ("cifar100-binary", 2),
    r"data_batch_\d+|test_batch": ("cifar10-pickles", 0),
    r"train|test": ("cifar100-pickles", 0),
}
BESIDE = {"cifar100-binary": "fine_label_names.txt", "cifar100-pickles": "meta"}  # plain names alone prove nothing
META = {"cifar10-binary": "batches.meta.txt", "cifar10-pickles": "batches.meta"}
LABEL_COLUMNS = ("fine_label", "coarse_label")


class Batch(NamedTuple):
    name: str  # relative to the source
    form: Literal["cifar10-binary", "cifar100-binary", "cifar10-pickles", "cifar100-pickles"]
    label_bytes: int

    @property
    def folder(self) -> str:
        return os.path.dirname(self.name)

    @property
    def pickled(self) -> bool:
        return self.form.endswith("pickles")


def find_cifar(names: Sequence[str]) -> list[Batch]:
    known = set(names)
    batches = []
    for name in names:
        folder, _, own = name.rpartition("/")
        for pattern, (form, label_bytes) in FORMS.items():
            beside = os.path.join(folder, BESIDE[form]) if form in BESIDE else name
            if re.fullmatch(pattern, own) and beside in known:
                batches.append(Batch(name, form, label_bytes))
    return batches


def list_cifar(root: Path, names: Sequence[str], listing: Listing, label_column: str | None) -> None:
    """Add every image to `listing`. InputError for damage, a pickle that is more than data, several sets."""
    batches = find_cifar(names)
    if len({(batch.folder, batch.form) for batch in batches}) > 1:
        both = f"{batches[0].name} and {batches[-1].name}"
        raise InputError(f"{root}: holds several sets of CIFAR, {both}; name the folder of one of them")
    coarse = _is_coarse(root, batches[0].form, label_column)
    class_names = _class_names(root, batches[0], names, coarse)
    if class_names:
        why = "the names of the classes"
        listing.rejected.append(Rejected(_meta_name(batches[0], coarse), "read_as_labels", why))
    for batch in batches:
        pixels, labels, file_names = _read(root / batch.name, batch, coarse)
        if class_names and max(labels) >= len(class_names):
            fix = "its meta file or the batch is another set's"
            raise InputError(f"{root / batch.name}: label {max(labels)}, and there are {len(class_names)} names; {fix}")
        split = "test" if os.path.basename(batch.name).startswith("test") else "train"
        for number, (values, label) in enumerate(zip(pixels, labels, strict=True)):
            stamp = xxhash.xxh3_64_intdigest(values.tobytes()) & HASH_BITS
            name = file_names[number] if file_names else None
            add_row(listing, batch.name, number, PIXELS, stamp, label, split, name)
    listing.classes = numbered_classes(listing.labels.values(), class_names)


def locate_cifar(path: Path, scratch: Path) -> Rows:
    batch = next(iter(find_cifar([path.name, *BESIDE.values()])))
    if batch.pickled:
        path = spooled(scratch, path, "pixels", lambda file: _unpack(path, file))
        return Rows(path, range(0, path.stat().st_size, PIXELS), PIXELS, SHAPE, planes_first=True)
    starts = range(batch.label_bytes, path.stat().st_size, batch.label_bytes + PIXELS)
    return Rows(path, starts, PIXELS, SHAPE, planes_first=True)


def _is_coarse(root: Path, form: str, label_column: str | None) -> bool:
    if label_column is None or (form.startswith("cifar100") and label_column in LABEL_COLUMNS):
        return label_column == LABEL_COLUMNS[1]
    rule = f"CIFAR-100 has {' and '.join(LABEL_COLUMNS)}" if form.startswith("cifar100") else "CIFAR-10 has one label"
    raise InputError(f"{root}: label_column: {label_column}: {rule}; leave the key out for the usual one")


def _read(path: Path, batch: Batch, coarse: bool) -> tuple[np.ndarray, list[int], list[str]]:
    """(N, 3072) pixels, N labels, and the images' names where the batch has them."""
    if batch.pickled:
        return _read_pickle(path, coarse)
    record = batch.label_bytes + PIXELS
    try:
        values = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not len(values) or len(values) % record:
        rule = f"a batch is a whole number of records of {record} bytes"
        raise InputError(f"{path}: {len(values)} bytes: {rule}; it is cut or no batch of CIFAR, fetch it again")
    records = values.reshape(-1, record)
    labels = records[:, 0 if coarse else batch.label_bytes - 1]
    return records[:, batch.label_bytes :], labels.tolist(), []


def _read_pickle(path: Path, coarse: bool) -> tuple[np.ndarray, list[int], list[str]]:
    try:
        with open(path, "rb") as file:
            content = read_batch(file, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    pixels = content.get("data")
    key = next((key for key in ("labels", LABEL_COLUMNS[coarse] + "s") if key in content), None)
    labels = content.get(key)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS or not len(pixels):
        raise InputError(f"{path}: data: not an array of N x {PIXELS} bytes; it is no batch of CIFAR")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(_is_label(label) for label in labels):
        raise InputError(f"{path}: {key or 'labels'}: not {len(pixels)} numbers from 0, one an image; fetch it again")
    file_names = texts(content.get("filenames"))
    return pixels, labels, file_names if len(file_names) == len(pixels) else []


def _is_label(value: object) -> bool:
    return type(value) is int and 0 <= value < 1000


def _class_names(root: Path, batch: Batch, names: Sequence[str], coarse: bool) -> tuple[str, ...]:
    """Of the meta file; empty where there is none."""
    name = _meta_name(batch, coarse)
    if name not in names:
        return ()
    try:
        if not batch.pickled:
            return tuple(line.strip() for line in (root / name).read_text().splitlines() if line.strip())
        with open(root / name, "rb") as file:
            content = read_batch(file, root / name)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{root / name}: cannot be read ({error})") from None
    return tuple(
        texts(content.get("label_names" if batch.form == "cifar10-pickles" else f"{LABEL_COLUMNS[coarse]}_names"))
    )


def _meta_name(batch: Batch, coarse: bool) -> str:
    names = f"{LABEL_COLUMNS[coarse]}_names.txt" if batch.form == "cifar100-binary" else META.get(batch.form, "meta")
    return os.path.join(batch.folder, names)


def _unpack(path: Path, file: BinaryIO) -> None:
    with open(path, "rb") as batch:
        file.write(np.ascontiguousarray(read_batch(batch, path)["data"]).data)
