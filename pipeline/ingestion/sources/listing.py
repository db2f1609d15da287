"""What a source of raw images is: it lists every file once and reads one at a time.

A source is small and picklable, so that worker processes read their own files.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.ingestion.rejected import Rejected
from pipeline.shards.decoding import TIFF_SIGNATURES, ImageFault

MAX_FILE_BYTES = 1 << 29
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .tif .tiff .gif .bmp .dib .avif .avifs .jp2 .j2k "
    ".ppm .pgm .pbm .pfm .npy "
    # These cannot be decoded, but whoever has a folder of them must hear of it.
    ".heic .heif .jxl .tga .psd .exr .hdr .dng .cr2 .cr3 .crw .nef .arw .orf .raf .rw2 "
    ".pef .srw .dcm .ico .svg .svgz".split()
)
HEAD_BYTES = 16
HEADS_AT_ONCE = 16  # requests, where a file's first bytes are one away
BLOCK_FILES = 10_000  # so that millions of files do not wait in the threads' queue at once
SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\x93NUMPY"),
    *TIFF_SIGNATURES,
)


HIDDEN = "its folder's name begins with a dot, so it is hidden; rename the folder if its images are meant"
NO_IMAGE = "neither its name nor its first bytes are an image's"


class SourceFile(NamedTuple):
    """A file that may be an image. `path` is relative to the source, with slashes; `stamp` changes with the content."""

    path: str
    bytes: int
    stamp: int


class SourceFiles(Sequence[SourceFile]):
    """Files as columns, so that a million of them are little more than their paths."""

    def __init__(self, files: Iterable[SourceFile] = ()):
        self.paths: list[str] = []
        self.bytes = array("q")
        self.stamps: array | list = array("q")
        self.extend(files)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int | slice) -> "SourceFile | list[SourceFile]":
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return SourceFile(self.paths[number], self.bytes[number], self.stamps[number])

    def __iter__(self) -> Iterator[SourceFile]:
        return map(SourceFile, self.paths, self.bytes, self.stamps)

    def append(self, file: SourceFile) -> None:
        path, num_bytes, stamp = file
        self.paths.append(path)
        self.bytes.append(num_bytes)
        try:
            self.stamps.append(stamp)
        except (OverflowError, TypeError):  # a source whose stamps are no 64-bit numbers
            self.stamps = [*self.stamps, stamp]

    def extend(self, files: Iterable[SourceFile]) -> None:
        for file in files:
            self.append(file)

    def reordered(self, order: np.ndarray) -> "SourceFiles":
        """The files of these numbers, in their order."""
        files, numbers = SourceFiles(), order.tolist()
        files.paths = [self.paths[number] for number in numbers]
        files.bytes = array("q", map(self.bytes.__getitem__, numbers))
        stamps = map(self.stamps.__getitem__, numbers)
        files.stamps = array("q", stamps) if isinstance(self.stamps, array) else list(stamps)
        return files


@dataclass
class Listing:
    """Every file of a source, and what the source itself says of its images, by path; a labels file overrules it.

    A label is a class name, or a number where `classes` names all of them in the order of their numbers.
    """

    images: SourceFiles = field(default_factory=SourceFiles)
    rejected: list[Rejected] = field(default_factory=list)
    labels: Mapping[str, str | int] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    folders_are_classes: bool = True  # where there are no labels; the folders of tables and archives say nothing
    stamps_are_hashes: bool = False  # of the content: images of equal sizes and stamps are equal
    notes: list[str] = field(default_factory=list)  # for the certificate: what the source holds and was not read

    def __post_init__(self) -> None:
        if not isinstance(self.images, SourceFiles):
            self.images = SourceFiles(self.images)

    @property
    def num_files(self) -> int:
        return len(self.images) + len(self.rejected)


class Source(Protocol):
    def list_files(self) -> Listing:
        """Every file: as a possible image, or with the reason why not."""

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        """The file's first bytes, or all; OSError or ImageFault when that fails."""


def named_like_image(path: str) -> bool:
    name = path.rpartition("/")[2]
    # "._photo.jpg" is what macOS writes beside photo.jpg on foreign disks; it holds no image.
    return not name.startswith("._") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def in_hidden_folder(path: str) -> bool:
    return any(folder.startswith(".") and folder != ".." for folder in path.split("/")[:-1])


def looks_like_image(head: bytes) -> bool:
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    avif = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis")
    return webp or avif or head.startswith(SIGNATURES)


def keep_images(files: Iterable[SourceFile], head: Callable[[str], bytes], listing: Listing) -> None:
    """Sort files into `listing`: images are those that are named so, or whose first bytes say it."""
    unnamed = []

    def keep(file: SourceFile) -> None:
        if in_hidden_folder(file.path):
            listing.rejected.append(Rejected(file.path, "hidden", HIDDEN))
        else:
            listing.images.append(file)

    def fault_of(file: SourceFile) -> Rejected | None:
        try:
            if looks_like_image(head(file.path)):
                return None
        except (OSError, ImageFault) as fault:
            why = getattr(fault, "detail", None) or getattr(fault, "strerror", None) or str(fault)
            return Rejected(file.path, "not_an_image", f"its name is not an image's, and it cannot be read: {why}")
        return Rejected(file.path, "not_an_image", NO_IMAGE)

    for file in files:
        (keep if named_like_image(file.path) else unnamed.append)(file)
    with ThreadPoolExecutor(HEADS_AT_ONCE) as readers:
        for start in range(0, len(unnamed), BLOCK_FILES):
            block = unnamed[start : start + BLOCK_FILES]
            for file, rejected in zip(block, readers.map(fault_of, block), strict=True):
                if rejected:
                    listing.rejected.append(rejected)
                else:
                    keep(file)
