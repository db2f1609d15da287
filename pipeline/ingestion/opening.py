"""Which source a name stands for."""

import os
from pathlib import Path
from typing import NamedTuple

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError, near_matches
from pipeline.ingestion.archives.naming import expand_archives, is_zip, names_archives
from pipeline.ingestion.archives.opening import AdoptedTars, open_archives
from pipeline.ingestion.archives.rewriting import SampleSource
from pipeline.ingestion.archives.source import ArchiveSource
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.progress import Progress, counted, untold
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.digits import DIGITS, DigitsSource
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.ingestion.sources.listing import Listing, Source
from pipeline.ingestion.sources.objects import ObjectSource
from pipeline.ingestion.tables.idx import find_idx
from pipeline.ingestion.tables.names import SaidColumns, find_parquet
from pipeline.ingestion.tables.opening import parquet_files, tables_within
from pipeline.storage.location import Location, Url, is_url, is_web, joined, location

KINDS = (
    "a source is a folder of images or tables, a parquet file, a zip, tars ('path/{0..9}.tar'), a URL of any of them, "
    f"or {DIGITS}"
)


class Opened(NamedTuple):
    """A source and its files. Of adopted tars there is no listing but of the files beside them."""

    source: Source | AdoptedTars
    listing: Listing

    @property
    def tars(self) -> str | None:
        """What becomes of tars, as the config says it; None where there are none."""
        match self.source:
            case AdoptedTars():
                return "adopt"
            case SampleSource():
                return "rewrite"
            case ArchiveSource(archives) if not is_zip(archives[0].name):
                return "archive"
        return None


def list_source(source: str, config: IngestConfig, scratch: Scratch, progress: Progress = untold) -> Opened:
    """InputError with what would do instead. A folder that holds no image but archives or tables stands for them."""
    if _named_locally(source) != source:
        return list_source(_named_locally(source), config, scratch, progress)
    found = _list_files(source, config, scratch)
    columns = SaidColumns(config.image_column, config.label_column)
    if not isinstance(found.source, AdoptedTars):
        files, listing = found
        if isinstance(files, SampleSource) and not listing.images:
            files = ArchiveSource(files.archives)  # by its files, for it holds no samples
            listing = files.list_files()
        if tables := tables_within(source, files, listing, columns, scratch):
            return Opened(tables, tables.list_files(listing, counted(progress, "listing tables")))
    for key, column in columns._asdict().items():
        if column is not None:
            raise InputError(f"{source}: {key}_column: {column}: images in files have no columns; leave the key out")
    return found


def _list_files(source: str, config: IngestConfig, scratch: Scratch) -> Opened:
    if names_archives(source):
        archives = open_archives(source, expand_archives(source), config.tars, scratch, config.processes)
        return Opened(archives, _listing_of(archives))
    opened = open_source(source)
    listing = opened.list_files()
    if not listing.images and (inside := _archives_inside(source, listing)):
        archives = open_archives(source, inside, config.tars, scratch, config.processes)
        within = _listing_of(archives)
        taken = {str(archive) for archive in inside}
        within.rejected += [entry for entry in listing.rejected if str(_inside(source, entry)) not in taken]
        return Opened(archives, within)
    if config.tars is not None:
        raise InputError(f"{source}: tars: {config.tars}: for tars, and there are none; leave `tars` out")
    return Opened(opened, listing)


def open_source(source: str) -> Source:
    """The folder, URL or built-in set of this name; archives are not opened here."""
    if source.startswith("sklearn:"):
        if source != DIGITS:
            raise InputError(f"{source}: no such built-in images; {near_matches(source, [DIGITS])}")
        return DigitsSource()
    if is_url(source):
        return ObjectSource(_url(source))
    path = Path(source)
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"{source}: may not be read; ask its owner for access")
    if path.is_dir():
        return FolderSource(path)
    if find_parquet([source]):
        return parquet_files(source)
    if path.is_file() and find_idx([path.name]):
        raise InputError(f"{source}: one file of several; name its folder, where the labels lie, too")
    if path.exists():
        raise InputError(f"{source}: a file; {KINDS}")
    raise InputError(f"{source}: no such folder; {KINDS}")


def source_name(source: str) -> str:
    """What identifies the source: an absolute path, or a URL; InputError for one that may carry a secret, or none."""
    if not source.strip():
        raise InputError(f"SOURCE is empty; {KINDS}")
    source = _named_locally(source)
    if is_url(source):
        _url(source)
    if source == DIGITS or is_url(source):
        return source
    return os.path.abspath(source)


def _named_locally(source: str) -> str:
    return source if source == DIGITS or is_url(source) else str(location(os.path.expanduser(source)))


def _url(source: str) -> Url:
    found = location(source)
    if "?" in source and (is_web(source) or not names_archives(source)):  # elsewhere a pattern may have it
        raise InputError(
            f"{source.partition('?')[0]}?...: what follows `?` may be a key, and would be kept with the dataset; give "
            "credentials by the environment, or download it"
        )
    return found


def _listing_of(source: Source | AdoptedTars) -> Listing:
    return Listing() if isinstance(source, AdoptedTars) else source.list_files()


def _archives_inside(source: str, listing: Listing) -> list[Location]:
    """The archives of a folder without images, where they are of one kind."""
    inside = [_inside(source, entry) for entry in listing.rejected if names_archives(entry.path)]
    return inside if len({is_zip(archive) for archive in inside}) == 1 else []


def _inside(source: str, entry: Rejected) -> Location:
    return joined(location(os.path.abspath(source) if not is_url(source) else source), entry.path)
