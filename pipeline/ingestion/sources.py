"""Where raw images come from: a folder, or scikit-learn's digits. Lists every file once; reads one at a time.

A source is small and picklable, so that worker processes read their own files.
"""

import hashlib
import io
import os
import stat
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from pipeline.errors import InputError, near_matches
from pipeline.ingestion.rejected import Rejected
from pipeline.shards.decoding import TIFF_SIGNATURES, ImageFault

MAX_FILE_BYTES = 1 << 29
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .tif .tiff .gif .bmp .dib .avif .avifs .jp2 .j2k "
    ".ppm .pgm .pbm .pfm .npy "
    # These cannot be decoded, but whoever has a folder of them must hear of it.
    ".heic .heif .jxl .tga .psd .exr .hdr .dng .cr2 .cr3 .nef .arw .dcm".split()
)
HEAD_BYTES = 16
SIGNATURES = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\x93NUMPY"),
    *TIFF_SIGNATURES,
)
DIGITS = "sklearn:digits"


class SourceFile(NamedTuple):
    """A file that may be an image. `path` is relative to the source, with slashes; `stamp` changes with the content."""

    path: str
    bytes: int
    stamp: int


class Listing(NamedTuple):
    images: list[SourceFile]
    rejected: list[Rejected]

    @property
    def num_files(self) -> int:
        return len(self.images) + len(self.rejected)


class Source(Protocol):
    def list_files(self) -> Listing:
        """Every file: as a possible image, or with the reason why not."""

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        """The file's first bytes, or all; OSError or ImageFault when that fails."""


@dataclass(frozen=True)
class FolderSource:
    """Every file below `root`, through links to folders too (a subset of ImageNet is often made of those)."""

    root: Path

    def list_files(self) -> Listing:
        listing = Listing([], [])
        self._list_folder("", (), listing)
        return listing

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        with open(self.root / path, "rb") as file:
            if num_bytes < 0 and os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ImageFault("file_too_large", f"more than {MAX_FILE_BYTES} bytes")
            return file.read(num_bytes)

    def _list_folder(self, folder: str, above: tuple[tuple[int, int], ...], listing: Listing) -> None:
        status = os.stat(self.root / folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            listing.rejected.append(Rejected(folder, "unreadable_file", "a link to a folder that holds it"))
            return
        with os.scandir(self.root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    if entry.is_dir():
                        self._list_folder(path, (*above, here), listing)
                    else:
                        self._list_file(path, entry.stat(), listing)
                except OSError as error:
                    listing.rejected.append(Rejected(path, "unreadable_file", error.strerror or str(error)))

    def _list_file(self, path: str, status: os.stat_result, listing: Listing) -> None:
        if not stat.S_ISREG(status.st_mode):
            listing.rejected.append(Rejected(path, "unreadable_file", "not a regular file"))
        elif named_like_image(path) or looks_like_image(self.read(path, HEAD_BYTES)):
            listing.images.append(SourceFile(path, status.st_size, status.st_mtime_ns))
        else:
            why = "neither its name nor its first bytes are an image's"
            listing.rejected.append(Rejected(path, "not_an_image", why))


@dataclass(frozen=True)
class DigitsSource:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, as split/class/number.png.

    Values 0..16 become 0..255. A fifth of each class, chosen by a hash of the digit's number, is the test split.
    """

    def list_files(self) -> Listing:
        from sklearn.datasets import load_digits

        by_class: dict[int, list[int]] = {}
        for number, digit in enumerate(load_digits().target):
            by_class.setdefault(int(digit), []).append(number)
        paths = []
        for digit, numbers in by_class.items():
            numbers.sort(key=lambda number: hashlib.sha256(f"digits:{number}".encode()).digest())
            num_test = len(numbers) // 5
            paths += [f"test/{digit}/{number:04d}.png" for number in numbers[:num_test]]
            paths += [f"train/{digit}/{number:04d}.png" for number in numbers[num_test:]]
        return Listing([SourceFile(path, 0, 0) for path in sorted(paths)], [])

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        values = _digit_images()[int(PurePosixPath(path).stem)]
        buffer = io.BytesIO()
        Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()[: None if num_bytes < 0 else num_bytes]


@cache
def _digit_images() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().images


def named_like_image(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    # "._photo.jpg" is what macOS writes beside photo.jpg on foreign disks; it holds no image.
    return not name.startswith("._") and os.path.splitext(name)[1] in IMAGE_SUFFIXES


def looks_like_image(head: bytes) -> bool:
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    avif = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis")
    return webp or avif or head.startswith(SIGNATURES)


def open_source(source: str) -> Source:
    """The folder or built-in set of this name; InputError with what would do instead. Tars are not opened here."""
    if source.startswith("sklearn:"):
        if source != DIGITS:
            raise InputError(f"{source}: no such built-in images; {near_matches(source, [DIGITS])}")
        return DigitsSource()
    if "://" in source:
        raise InputError(f"{source}: a URL is not read; download it and give the folder")
    kinds = f"a source is a folder of images, tars ('path/{{0..9}}.tar') or {DIGITS}"
    path = Path(source)
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"{source}: may not be read; ask its owner for access")
    if path.is_dir():
        return FolderSource(path)
    if path.exists():
        raise InputError(f"{source}: a file; {kinds}")
    raise InputError(f"{source}: no such folder; {kinds}")
