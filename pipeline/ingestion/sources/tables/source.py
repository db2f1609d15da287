"""A folder of tables that hold images: idx, CIFAR's batches, parquet, datasets saved by Hugging Face's `datasets`."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pipeline.errors import InputError
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.ingestion.sources.listing import Listing, named_like_image
from pipeline.ingestion.sources.tables.arrow import find_parquet, find_saved, list_arrow, locate_arrow
from pipeline.ingestion.sources.tables.cifar import find_cifar, list_cifar, locate_cifar
from pipeline.ingestion.sources.tables.columns import UNSAID, SaidColumns
from pipeline.ingestion.sources.tables.idx import find_idx, list_idx, locate_idx
from pipeline.ingestion.sources.tables.listing import reject_rest, row_of_path
from pipeline.ingestion.sources.tables.rows import Rows

Kind = Literal["idx", "CIFAR", "parquet", "saved"]
WORDS = {"idx": "idx files", "CIFAR": "batches of CIFAR", "parquet": "parquet files", "saved": "saved datasets"}
LOOKED_AT = 10_000  # names, those of the upper folders first: tables lie high up, and images may be millions
MAX_DEPTH = 4
CACHED_TABLES = 4096


@dataclass(frozen=True)
class TableSource:
    """Every row of the tables of one kind below `root`, or of `only` one of them. `scratch` is where spools go."""

    root: Path
    kind: Kind
    scratch: Path
    columns: SaidColumns = UNSAID
    only: str | None = None

    def list_files(self) -> Listing:
        """Reads every table once; InputError where one is damaged, or images lie beside them."""
        listing = Listing(folders_are_classes=False, stamps_are_hashes=True)
        if self.only is not None:
            self._list_tables([self.only], listing)
            return listing
        beside = FolderSource(self.root).list_files()
        if beside.images:
            raise InputError(_mixed(self.root, self.kind, beside.images[0].path))
        names = [entry.path for entry in beside.rejected if entry.reason == "not_an_image"]
        listing.rejected += [entry for entry in beside.rejected if entry.reason != "not_an_image"]
        self._list_tables(names, listing)
        tables = set(self._tables(names)) | {entry.path for entry in listing.rejected}
        reject_rest(listing, (name for name in names if name not in tables), "holds no images")
        return listing

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        table, number = row_of_path(path)
        try:
            content = self._rows(table).read(number)
        except FileNotFoundError:  # the spool of an earlier ingestion in this process
            _located.cache_clear()
            content = self._rows(table).read(number)
        return content if num_bytes < 0 else content[:num_bytes]

    def _rows(self, table: str) -> Rows:
        path = self.root / table
        status = os.stat(path)
        return _located(path, status.st_size, status.st_mtime_ns, self.kind, self.scratch, self.columns)

    def _tables(self, names: Sequence[str]) -> list[str]:
        return tables_of_kind(self.root, self.kind, names)

    def _list_tables(self, names: Sequence[str], listing: Listing) -> None:
        match self.kind:
            case "idx":
                list_idx(self.root, names, listing)
            case "CIFAR":
                list_cifar(self.root, names, listing, self.columns.label)
            case "parquet" | "saved":
                list_arrow(self.root, self._tables(names), listing, self.columns)


def tables_of_kind(root: Path, kind: Kind, names: Sequence[str]) -> list[str]:
    match kind:
        case "idx":
            return find_idx(names)
        case "CIFAR":
            return [batch.name for batch in find_cifar(names)]
        case "parquet":
            return find_parquet(names)
        case "saved":
            return find_saved(root, names)


def find_tables(root: Path, scratch: Path, columns: SaidColumns) -> TableSource | None:
    """The tables of a folder; None where it has none. InputError where it holds several kinds, or images too."""
    names = sorted(_upper_names(root))
    kinds = [kind for kind in WORDS if tables_of_kind(root, kind, names)]
    if not kinds:
        return None
    if len(kinds) > 1:
        both = " and ".join(WORDS[kind] for kind in kinds)
        raise InputError(f"{root}: holds {both}; name the folder of one kind")
    image = next(filter(named_like_image, names), None)
    if image is not None:
        if kinds == ["parquet"]:  # tables about the images, perhaps
            return None
        raise InputError(_mixed(root, kinds[0], image))
    return TableSource(root, kinds[0], scratch, columns)


def table_file(path: Path, scratch: Path, columns: SaidColumns) -> TableSource | None:
    """A single parquet file; None where it is none."""
    return TableSource(path.parent, "parquet", scratch, columns, path.name) if find_parquet([path.name]) else None


@lru_cache(CACHED_TABLES)
def _located(path: Path, size: int, modified: int, kind: Kind, scratch: Path, columns: SaidColumns) -> Rows:
    """`size` and `modified` tell states of one file apart."""
    match kind:
        case "idx":
            return locate_idx(path, scratch)
        case "CIFAR":
            return locate_cifar(path, scratch)
        case "parquet" | "saved":
            return locate_arrow(path, scratch, columns)


def _upper_names(root: Path) -> Iterator[str]:
    level, looked = [""], 0
    for _ in range(MAX_DEPTH):
        below = []
        for folder in level:
            try:
                with os.scandir(root / folder) as entries:
                    for entry in entries:
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        looked += 1
                        if entry.is_dir():
                            below.append(path)
                        else:
                            yield path
                        if looked >= LOOKED_AT:
                            return
            except OSError:  # the listing says so
                pass
        level = sorted(below)


def _mixed(root: Path, kind: Kind, image: str) -> str:
    return f"{root}: holds {WORDS[kind]} and images, such as {image}; name a folder with one of them"
