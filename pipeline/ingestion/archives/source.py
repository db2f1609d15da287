"""Archives as a source: zips and tars read in place, alone or several together.

Whoever opens the source reads each directory once; what is sent to a worker (`narrowed`) has the places of its own
files and nothing else, so a worker reads an entry at once, and a million entries are nobody's burden.
"""

import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import InputError
from pipeline.ingestion.archives.entries import ROW, Entry, climbing_path, path_hash, row_of, safe_path
from pipeline.ingestion.archives.members import TarFault, tar_entries
from pipeline.ingestion.archives.naming import count_up, is_zip, prefixes
from pipeline.ingestion.archives.zips import read_zip_entry, zip_entries
from pipeline.ingestion.labelling.labels import number_folders
from pipeline.ingestion.labelling.splits import SPLIT_FOLDERS, class_folders, folder_splits, root_folder
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    Listing,
    Source,
    SourceFile,
    SourceFiles,
    keep_images,
    named_like_image,
)
from pipeline.ingestion.sources.read_ahead import sent_ahead
from pipeline.shards.decoding import ImageFault
from pipeline.shards.shard_file import LocalFile
from pipeline.storage.location import Location, Url, location, read_range, size_of, stamp_of
from pipeline.storage.random_access import open_random

READERS = 8  # directories read at once
OPEN_FILES = 64  # kept open by a process
_PACKED_ROW = struct.Struct("<QIQQQIHH")  # ROW, as struct writes it


class Archive(NamedTuple):
    """`where` it is read (a compressed tar: where it was unpacked), its `name` as given, the `prefix` of its paths."""

    where: Location
    name: str
    prefix: str
    bytes: int
    stamp: int

    def path(self, path: str) -> str:
        """Of an entry, in the source."""
        return f"{self.prefix}/{path}" if self.prefix else path


def archives_at(locations: Sequence[Location], unpacked: Sequence[Location] | None = None) -> tuple[Archive, ...]:
    """The archives; `unpacked` says where the plain ones of compressed tars lie."""
    with ThreadPoolExecutor(READERS) as readers:
        sizes = list(readers.map(size_of, unpacked or locations))
        stamps = list(readers.map(stamp_of, locations))
    return tuple(
        Archive(where, str(name), prefix, size, stamp)
        for where, name, prefix, size, stamp in zip(
            unpacked or locations, locations, prefixes(locations), sizes, stamps, strict=True
        )
    )


@dataclass(frozen=True, eq=False)
class ArchiveSource:
    """Every file in `archives`. `table`, of entries.ROW, has the places of some files; None: of all."""

    archives: tuple[Archive, ...]
    table: np.ndarray | None = None

    def list_files(self) -> Listing:
        return self._listed[0]

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        row = row_of(self._listed[1] if self.table is None else self.table, path)
        if row is None:
            raise FileNotFoundError(f"{path}: not in the archive")
        return read_entry(self.archives[int(row["archive"])], row, num_bytes)

    def narrowed(self, paths: Sequence[str]) -> Source:
        """The same for these files alone."""
        return narrowed(self.archives, self._listed[1] if self.table is None else self.table, paths)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_listed"}

    @cached_property
    def _listed(self) -> tuple[Listing, np.ndarray]:
        return _list_archives(self.archives)


def narrowed(archives: Sequence[Archive], table: np.ndarray, paths: Sequence[str]) -> Source:
    wanted = np.fromiter(map(path_hash, paths), np.uint64, len(paths))
    rows = table[np.searchsorted(table["path"], wanted)]
    assert (rows["path"] == wanted).all(), "files of another listing"
    numbers, rows["archive"] = np.unique(rows["archive"], return_inverse=True)
    rows.sort(order="path")
    source = ArchiveSource(tuple(archives[number] for number in numbers), rows)
    return sent_ahead(source, paths, [archive.where for archive in source.archives])


def read_entry(archive: Archive, row: np.void, num_bytes: int) -> bytes:
    """The first bytes of the entry at `row`, or all; OSError, ImageFault."""
    if num_bytes < 0 and max(row["bytes"], row["stored"]) > MAX_FILE_BYTES:
        raise ImageFault("file_too_large", f"more than {MAX_FILE_BYTES} bytes")
    pread = _pread(archive)
    if is_zip(archive.name):
        return read_zip_entry(pread, row, num_bytes)
    size = int(row["bytes"]) if num_bytes < 0 else min(num_bytes, int(row["bytes"]))
    content = pread(size, int(row["offset"])) if size else b""
    if len(content) < size:
        raise ImageFault("broken_image", f"the tar ends after {len(content)} of its {size} bytes")
    return content


def _pread(archive: Archive) -> Callable[[int, int], bytes]:
    if isinstance(archive.where, Url):
        return lambda size, offset: read_range(archive.where, offset, size)
    file = _opened(archive)
    if file.size != archive.bytes:
        raise OSError(f"{archive.where}: has changed while it was read")
    # Not `file.pread` alone: two threads may open at once, and a file that is not kept closes with its last holder.
    return lambda size, offset: file.pread(size, offset)


@lru_cache(OPEN_FILES)
def _opened(archive: Archive) -> LocalFile:
    return LocalFile(os.open(archive.where, os.O_RDONLY | os.O_CLOEXEC))


@dataclass
class _Found:
    """What one archive holds: the paths of its files within it, their rows without the hashes of their paths."""

    archive: Archive
    number: int
    paths: list[str] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    rows: bytearray = field(default_factory=bytearray)

    def list_entries(self) -> None:
        with open_random(self.archive.where) as file:
            if is_zip(self.archive.name):
                entries = zip_entries(file, self.archive.name)
            else:
                entries = tar_entries(file, self.archive.name, self.archive.stamp)
            try:
                for entry in entries:
                    self._add(entry)
            except TarFault as fault:
                raise InputError(str(fault)) from None

    def _add(self, entry: Entry) -> None:
        path = safe_path(entry.name)
        if path is None and (climbing := climbing_path(entry.name)) and named_like_image(climbing):
            path = climbing
        if path is None:
            why = "its name is no path within the archive"
            self.rejected.append(Rejected(self.archive.path(entry.name), "unsafe_name", why))
        elif entry.fault is not None and named_like_image(path):
            self.rejected.append(Rejected(self.archive.path(path), "unreadable_file", entry.fault))
        elif entry.fault is not None:
            why = f"its name is not an image's, and it cannot be looked into: {entry.fault}"
            self.rejected.append(Rejected(self.archive.path(path), "not_an_image", why))
        else:
            self.paths.append(path)
            self.stamps.append(entry.stamp)
            self.rows += _PACKED_ROW.pack(
                0, self.number, entry.offset, entry.stored, entry.bytes, entry.crc32, entry.method, entry.name_bytes
            )

    def whole_paths(self) -> list[str]:
        """With the prefix; `train/ant/1.jpg` in a train.zip beside a test.zip stays what it is."""
        wrapper = self.archive.prefix.rpartition("/")[2] + "/"
        if not self.archive.prefix or not all(path.startswith(wrapper) for path in self.paths):
            return [self.archive.path(path) for path in self.paths]
        above = self.archive.prefix.removesuffix(wrapper[:-1])
        return [above + path for path in self.paths]


def _list_archives(archives: Sequence[Archive]) -> tuple[Listing, np.ndarray]:
    found = [_Found(archive, number) for number, archive in enumerate(archives)]
    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(_Found.list_entries, found))
    listing, tables, inner = Listing(), [], {}
    files = SourceFiles()
    for of_archive in found:
        paths = of_archive.whole_paths()
        table = np.frombuffer(of_archive.rows, dtype=ROW)
        table["path"] = np.fromiter(map(path_hash, paths), np.uint64, len(paths))
        tables.append(table)
        files.extend(map(SourceFile, paths, table["bytes"].tolist(), of_archive.stamps))
        listing.rejected += of_archive.rejected
        if len(archives) > 1:
            inner |= zip(paths, of_archive.paths, strict=True)
        of_archive.paths.clear()
    table = np.concatenate(tables)
    table = table[np.argsort(table["path"], kind="stable")]
    files, table = _without_repeated(files, table, listing)

    def head(path: str) -> bytes:
        row = row_of(table, path)
        return read_entry(archives[int(row["archive"])], row, HEAD_BYTES)

    keep_images(files, head, listing)
    if len(archives) > 1:
        _say_labels(listing, archives, inner)
    return listing, table


def _without_repeated(files: SourceFiles, table: np.ndarray, listing: Listing) -> tuple[SourceFiles, np.ndarray]:
    """Where a path is there again, the last one stands, as for programs that unpack."""
    stays = np.append(table["path"][1:] != table["path"][:-1], True) if len(table) else np.ones(0, bool)
    if stays.all():
        return files, table
    repeated = set(table["path"][~stays].tolist())
    hashes = [path_hash(path) for path in files.paths]
    last = {hashed: number for number, hashed in enumerate(hashes) if hashed in repeated}
    kept = SourceFiles()
    for number, (file, hashed) in enumerate(zip(files, hashes, strict=True)):
        if last.get(hashed, number) == number:
            kept.append(file)
        else:
            why = "the archive has the name again further on, and the last one stands"
            listing.rejected.append(Rejected(file.path, "repeated_name", why))
    return kept, table[stays]


def _say_labels(listing: Listing, archives: Sequence[Archive], inner: dict[str, str]) -> None:
    """Parts of one set are no classes: where archives hold folders, those are, and split archives (`train.zip`) are
    left to the rule of folders. Where they hold images alone, each is a class, unless their names merely count up."""
    if any(part in SPLIT_FOLDERS for archive in archives for part in archive.prefix.split("/")):
        return
    paths = [inner[file.path] for file in listing.images]
    if all("/" not in path for path in paths):
        listing.folders_are_classes = not count_up([location(archive.name) for archive in archives])
        return
    root = root_folder(paths)
    classes, splits = class_folders(paths, root), folder_splits(paths, root)
    listing.folders_are_classes = False
    listing.splits = {
        file.path: splits[path] for file, path in zip(listing.images, paths, strict=True) if path in splits
    }
    numbered = number_folders({
        file.path: classes[path] for file, path in zip(listing.images, paths, strict=True) if path in classes
    })  # fmt: skip
    listing.labels, listing.classes = numbered.by_path, numbered.classes
