"""A folder of tables that hold images: idx, CIFAR's batches, parquet, datasets saved by Hugging Face's `datasets`."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pipeline.errors import InputError
from pipeline.ingestion.progress import Counted
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.ingestion.sources.listing import Listing
from pipeline.ingestion.tables.cifar import find_cifar, list_cifar, locate_cifar
from pipeline.ingestion.tables.idx import find_idx, list_idx, locate_idx
from pipeline.ingestion.tables.listing import reject_rest, row_of_path
from pipeline.ingestion.tables.names import UNSAID, SaidColumns, find_parquet
from pipeline.ingestion.tables.rows import Rows

Kind = Literal["idx", "CIFAR", "parquet", "saved"]
WORDS = {"idx": "idx files", "CIFAR": "batches of CIFAR", "parquet": "parquet files", "saved": "saved datasets"}
CACHED_TABLES = 4096
THREADS = 4  # unpack tables at once


@dataclass(frozen=True)
class TableSource:
    """Every row of the tables of one kind below the local folder `root`. `scratch` is where spools go.

    `name` is what stands for `root` in messages: tables of an archive or a URL were fetched there.
    """

    root: Path
    kind: Kind
    scratch: Path
    columns: SaidColumns = UNSAID
    name: str = ""
    only: tuple[str, ...] = ()  # the tables, where not all

    @property
    def raw_form(self) -> str | None:
        """What holds pixels alone, which are made image files here; None where the tables hold image files."""
        return self.kind if self.kind in ("idx", "CIFAR") else None

    def list_files(self, beside: Listing | None = None, listed: Counted | None = None) -> Listing:
        """Reads every table once; InputError where one is damaged. `beside` is the listing of the folder's files;
        `listed` is told of each table of parquet or a saved dataset, which may be large."""
        beside = beside or FolderSource(self.root).list_files()
        listing = Listing(folders_are_classes=False, stamps_are_hashes=True)
        names = [entry.path for entry in beside.rejected if entry.reason == "not_an_image"]
        listing.rejected += [entry for entry in beside.rejected if entry.reason != "not_an_image"]
        try:
            self._list_tables(names, listing, listed)
        except InputError as error:
            shown = self.name or str(self.root)
            raise InputError(*(problem.replace(str(self.root), shown) for problem in error.problems)) from None
        known = {*tables_of_kind(self.root, self.kind, names), *(entry.path for entry in listing.rejected)}
        reject_rest(listing, (name for name in names if name not in known), "holds no images")
        return listing

    def lay_out(self) -> None:
        """Make the spools, here and not where images are decoded: to unpack a table may take more memory and time than
        an image may. OSError of a full disk."""
        entries = FolderSource(self.root, self.only).list_files().rejected
        names = [entry.path for entry in entries if entry.reason == "not_an_image"]
        with ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(self._rows, tables_of_kind(self.root, self.kind, names)):
                pass

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

    def _list_tables(self, names: Sequence[str], listing: Listing, listed: Counted | None) -> None:
        match self.kind:
            case "idx":
                list_idx(self.root, names, listing)
            case "CIFAR":
                list_cifar(self.root, names, listing, self.columns.label)
            case "parquet" | "saved":
                from pipeline.ingestion.tables.arrow import (
                    list_arrow,  # pyarrow, for those who have such tables
                )

                list_arrow(self.root, tables_of_kind(self.root, self.kind, names), listing, self.columns, listed)


def tables_of_kind(root: Path, kind: Kind, names: Sequence[str]) -> list[str]:
    match kind:
        case "idx":
            return find_idx(names)
        case "CIFAR":
            return [batch.name for batch in find_cifar(names)]
        case "parquet":
            return find_parquet(names)
        case "saved":
            from pipeline.ingestion.tables.arrow import find_saved

            return find_saved(root, names)


@lru_cache(CACHED_TABLES)
def _located(path: Path, size: int, modified: int, kind: Kind, scratch: Path, columns: SaidColumns) -> Rows:
    """`size` and `modified` tell states of one file apart."""
    match kind:
        case "idx":
            return locate_idx(path, scratch)
        case "CIFAR":
            return locate_cifar(path, scratch)
        case "parquet" | "saved":
            from pipeline.ingestion.tables.arrow import locate_arrow

            return locate_arrow(path, scratch, columns)
