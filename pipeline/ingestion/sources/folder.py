"""A folder of images, through links to folders too (a subset of ImageNet is often made of those)."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import (
    HEAD_BYTES,
    HIDDEN,
    MAX_FILE_BYTES,
    NO_IMAGE,
    Listing,
    SourceFile,
    in_hidden_folder,
    looks_like_image,
    named_like_image,
)
from pipeline.shards.decoding import ImageFault


@dataclass(frozen=True)
class FolderSource:
    """Every file below `root`, or `only` some."""

    root: Path
    only: tuple[str, ...] = ()

    def list_files(self) -> Listing:
        listing = Listing()
        for name in self.only:
            self._list_file(name, os.stat(self.root / name), listing, hidden=in_hidden_folder(name))
        if not self.only:
            self._list_folder("", (), listing)
        return listing

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        file = os.open(f"{self.root}/{path}", os.O_RDONLY | os.O_CLOEXEC)  # without Python's buffer: half the time
        try:
            if num_bytes >= 0:
                return os.read(file, num_bytes)
            if (size := os.fstat(file).st_size) > MAX_FILE_BYTES:
                raise ImageFault("file_too_large", f"more than {MAX_FILE_BYTES} bytes")
            return _read_on(file, os.read(file, size + 1), size)
        finally:
            os.close(file)

    def _list_folder(self, folder: str, above: tuple[tuple[int, int], ...], listing: Listing) -> None:
        status = os.stat(self.root / folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            listing.rejected.append(Rejected(folder, "repeated_link", "a link to a folder that holds it"))
            return
        hidden = in_hidden_folder(f"{folder}/")
        with os.scandir(self.root / folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    if entry.is_dir():
                        self._list_folder(path, (*above, here), listing)
                    else:
                        self._list_file(path, entry.stat(), listing, hidden=hidden)
                except OSError as error:
                    listing.rejected.append(Rejected(path, "unreadable_file", error.strerror or str(error)))

    def _list_file(self, path: str, status: os.stat_result, listing: Listing, *, hidden: bool) -> None:
        if not stat.S_ISREG(status.st_mode):
            listing.rejected.append(Rejected(path, "unreadable_file", "not a regular file"))
        elif named_like_image(path) or looks_like_image(self.read(path, HEAD_BYTES)):
            if hidden:
                listing.rejected.append(Rejected(path, "hidden", HIDDEN))
            else:
                listing.images.append(SourceFile(path, status.st_size, status.st_mtime_ns))
        else:
            listing.rejected.append(Rejected(path, "not_an_image", NO_IMAGE))


def _read_on(file: int, content: bytes, size: int) -> bytes:
    """The whole of a file, of which a first read gave `content`; it may have grown beyond `size` since."""
    while len(content) != size and (more := os.read(file, 1 << 20)):
        content += more
        if len(content) > MAX_FILE_BYTES:
            raise ImageFault("file_too_large", f"more than {MAX_FILE_BYTES} bytes")
    return content
