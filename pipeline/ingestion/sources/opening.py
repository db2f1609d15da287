"""Which source a name stands for."""

import os
from pathlib import Path

from pipeline.errors import InputError, near_matches
from pipeline.ingestion.sources.digits import DIGITS, DigitsSource
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.ingestion.sources.listing import Source
from pipeline.ingestion.sources.tables.columns import UNSAID, SaidColumns
from pipeline.ingestion.sources.tables.source import find_tables, table_file


def open_source(source: str, scratch: Path, columns: SaidColumns = UNSAID) -> Source:
    """The folder, tables or built-in set of this name; InputError with what would do instead. Tars are not opened here.

    `scratch` is a folder that need not exist, where a source may lay out what it cannot read by pieces.
    """
    if source.startswith("sklearn:"):
        _require_no_columns(source, columns)
        if source != DIGITS:
            raise InputError(f"{source}: no such built-in images; {near_matches(source, [DIGITS])}")
        return DigitsSource()
    if "://" in source:
        raise InputError(f"{source}: a URL is not read; download it and give the folder")
    kinds = f"a source is a folder of images or tables, a parquet file, tars ('path/{{0..9}}.tar') or {DIGITS}"
    path = Path(source)
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"{source}: may not be read; ask its owner for access")
    if path.is_dir():
        if tables := find_tables(path, scratch, columns):
            return tables
        _require_no_columns(source, columns)
        return FolderSource(path)
    if path.is_file() and (table := table_file(path, scratch, columns)):
        return table
    if path.exists():
        raise InputError(f"{source}: a file; {kinds}")
    raise InputError(f"{source}: no such folder; {kinds}")


def _require_no_columns(source: str, columns: SaidColumns) -> None:
    for key, column in columns._asdict().items():
        if column is not None:
            raise InputError(f"{source}: {key}_column: {column}: a folder of images has no columns; leave the key out")
