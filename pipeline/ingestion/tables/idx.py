"""idx files, the form of the MNIST family: `train-images-idx3-ubyte(.gz)` and its labels beside it.

An idx file is a magic number (two zeros, a type, the number of dimensions), the dimensions as big-endian 32-bit
numbers, and the values. Pictures of EMNIST lie on their side in its own files, and stay so.
"""

import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from pipeline.errors import InputError
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import Listing
from pipeline.ingestion.tables.listing import HASH_BITS, MOST_LABEL, add_row, numbered_classes
from pipeline.ingestion.tables.rows import Rows, spooled

# Zalando's and LeCun's names, EMNIST's (`emnist-letters-train-...`), QMNIST's, and dots where a browser put them.
IMAGES_NAME = re.compile(
    r"(?:(?P<set>.*)[-_.])?(?P<split>train|t10k|test|validation|valid|val)[-_.]images?[-_.]idx[34][-_.]ubyte(?:\.gz)?",
    re.IGNORECASE,
)
SPLITS = {"train": "train", "t10k": "test", "test": "test"}  # anything else is validation
DTYPES = {0x08: "u1", 0x0C: ">i4"}
CHANNELS = (1, 3, 4)
CHUNK_ROWS = 4096
AGAIN = "fetch it again"


class Header(NamedTuple):
    bytes: int  # of the header
    dtype: np.dtype
    dimensions: tuple[int, ...]


def find_idx(names: Sequence[str]) -> list[str]:
    """The idx files of images among `names`."""
    return [name for name in names if IMAGES_NAME.fullmatch(name.rpartition("/")[2])]


def list_idx(root: Path, names: Sequence[str], listing: Listing) -> None:
    """Add every image to `listing`. InputError for damage and for sets that do not belong together."""
    tables = find_idx(names)
    doubled = {name for name in tables if name.endswith(".gz") and name.removesuffix(".gz") in tables}
    listing.rejected += [Rejected(name, "not_an_image", "the same file lies beside it unpacked") for name in doubled]
    tables = [name for name in tables if name not in doubled]
    _require_one_set(root, tables)
    for name in tables:
        split = IMAGES_NAME.fullmatch(name.rpartition("/")[2])["split"].lower()
        labels = _labels_beside(root, name, names)
        if labels is not None:
            listing.rejected.append(Rejected(labels[0], "read_as_labels", f"the labels of {name}"))
        header = None
        for number, content in _rows(root / name, images=True):
            if header is None:
                header = content
                if labels is not None and len(labels[1]) != header.dimensions[0]:
                    count = f"{len(labels[1])} labels for the {header.dimensions[0]} images of {name}"
                    raise InputError(f"{root / labels[0]}: {count}; fetch both again")
                continue
            label = None if labels is None else int(labels[1][number])
            stamp = xxhash.xxh3_64_intdigest(content) & HASH_BITS
            add_row(listing, name, number, len(content), stamp, label, SPLITS.get(split, "validation"))
    listing.classes = numbered_classes(listing.labels.values())


def locate_idx(path: Path, scratch: Path) -> Rows:
    if path.suffix.lower() == ".gz":
        path = spooled(scratch, path, "gunzip", lambda file: _unpack(path, file))
    with open(path, "rb") as file:
        header = _read_header(file, path, images=True)
    count, *shape = header.dimensions
    size = math.prod(shape)
    planes_first = len(shape) == 3 and shape[2] not in CHANNELS
    starts = range(header.bytes, header.bytes + count * size, size)
    return Rows(path, starts, size, tuple(shape), planes_first)


def _require_one_set(root: Path, tables: Sequence[str]) -> None:
    sets = {IMAGES_NAME.fullmatch(name.rpartition("/")[2])["set"] for name in tables}
    if len(sets) > 1:
        several = " and ".join(sorted(str(name or "unnamed") for name in sets))
        raise InputError(f"{root}: holds several sets of idx files, {several}; put each into a folder of its own")
    places: dict[str, str] = {}
    for name in tables:
        split = IMAGES_NAME.fullmatch(name.rpartition("/")[2])["split"].lower()
        if (other := places.setdefault(split, name)) != name:
            raise InputError(f"{root}: holds {split} twice, {other} and {name}; name the folder of one of them")


def _labels_beside(root: Path, images: str, names: Sequence[str]) -> tuple[str, np.ndarray] | None:
    """The name and the values of the labels file of `images`; None where there is none."""
    folder, slash, name = images.rpartition("/")
    begin, end = re.search(r"images?(?=[-_.]idx)", name, re.IGNORECASE).span()
    separators = re.fullmatch(r"([-_.])idx\d([-_.])ubyte(?:\.gz)?", name[end:], re.IGNORECASE)
    known = set(names)
    for kind in ("idx1{}ubyte", "idx2{}int"):
        for suffix in ("", ".gz"):
            labels = f"{folder}{slash}{name[:begin]}labels{separators[1]}{kind.format(separators[2])}{suffix}"
            if labels in known:
                return labels, _read_labels(root / labels)
    return None


def _read_labels(path: Path) -> np.ndarray:
    """Of two-dimensional labels (QMNIST) the first column is the class."""
    header, *rows = (content for _, content in _rows(path, images=False))
    values = np.frombuffer(b"".join(rows), header.dtype).reshape(header.dimensions)
    values = values if values.ndim == 1 else values[:, 0]
    for label in (values.min(), values.max()):
        if not 0 <= label <= MOST_LABEL:
            raise InputError(f"{path}: label {label}; a label is a number from 0 to {MOST_LABEL}; {AGAIN}")
    return values


def _rows(path: Path, *, images: bool) -> Iterator[tuple[int, Header | bytes]]:
    """(-1, header), then (number, its bytes) of every row; InputError where the file is cut or longer than it says."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            header = _read_header(file, path, images)
            yield -1, header
            count, size = header.dimensions[0], header.dtype.itemsize * math.prod(header.dimensions[1:])
            for start in range(0, count, CHUNK_ROWS):
                chunk = file.read(min(CHUNK_ROWS, count - start) * size)
                if len(chunk) < min(CHUNK_ROWS, count - start) * size:
                    raise InputError(_cut(path, header, start * size + len(chunk)))
                for number in range(len(chunk) // size):
                    yield start + number, chunk[number * size : (number + 1) * size]
            if file.read(1):
                raise InputError(f"{path}: longer than its header says ({_said(header)}); {AGAIN}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cut or damaged ({error}); {AGAIN}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _read_header(file: BinaryIO, path: Path, images: bool) -> Header:
    magic = file.read(4)
    dimensions = magic[3] if len(magic) == 4 else 0
    what, expected = ("images", (3, 4)) if images else ("labels", (1, 2))
    dtypes = (0x08,) if images else tuple(DTYPES)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in dtypes or dimensions not in expected:
        fix = f"idx {what} begin with 000008{expected[0]:02x}; {AGAIN}"
        raise InputError(f"{path}: magic number {magic.hex() or 'missing'}; {fix}")
    content = file.read(4 * dimensions)
    if len(content) < 4 * dimensions:
        raise InputError(f"{path}: ends in its header; {AGAIN}")
    header = Header(4 + 4 * dimensions, np.dtype(DTYPES[magic[2]]), struct.unpack(f">{dimensions}I", content))
    channels = header.dimensions[3:] and {header.dimensions[1], header.dimensions[3]} & set(CHANNELS)
    if 0 in header.dimensions or (images and dimensions == 4 and not channels):
        raise InputError(f"{path}: {_said(header)} in its header; images are number x height x width [x 1, 3 or 4]")
    return header


def _said(header: Header) -> str:
    return " x ".join(map(str, header.dimensions))


def _cut(path: Path, header: Header, read: int) -> str:
    whole = header.dtype.itemsize * math.prod(header.dimensions)
    return f"{path}: cut: {read} of the {whole} bytes that its header says ({_said(header)}); {AGAIN}"


def _unpack(path: Path, file: BinaryIO) -> None:
    with gzip.open(path) as packed:
        while chunk := packed.read(1 << 20):
            file.write(chunk)
