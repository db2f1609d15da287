"""Which source a name stands for."""

import os
from pathlib import Path

from pipeline.errors import InputError, near_matches
from pipeline.ingestion.sources.digits import DIGITS, DigitsSource
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.ingestion.sources.listing import Source


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
