"""Whether the files of a source are tables, and where their bytes can be read by pieces.

Tables of a local folder are read where they lie; those in an archive or behind a URL are fetched first, each once.
"""

import glob
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import DISK_FULL, InputError
from pipeline.ingestion.archives.naming import expand_braces
from pipeline.ingestion.archives.unpacking import PIECE_BYTES, Scratch
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.ingestion.sources.listing import Listing, Source
from pipeline.ingestion.sources.objects import ObjectSource
from pipeline.ingestion.tables.cifar import find_cifar
from pipeline.ingestion.tables.idx import find_idx
from pipeline.ingestion.tables.names import SaidColumns, find_parquet, saved_folders
from pipeline.ingestion.tables.source import WORDS, Kind, TableSource
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import shortened
from pipeline.storage.random_access import open_random

NO_COLUMNS = {("idx", "image"), ("idx", "label"), ("CIFAR", "image")}  # CIFAR-100's labels are of two kinds


def parquet_files(source: str) -> FolderSource:
    """The parquet files of a path with braces and globs, below the folder that holds them all."""
    found = [(pattern, glob.glob(pattern, recursive=True)) for pattern in expand_braces(source)]
    if os.path.isfile(source):
        found = [(source, [source])]
    if missing := [f"{pattern}: no such parquet file" for pattern, files in found if not files]:
        raise InputError(*shortened(missing))
    files = sorted({os.path.abspath(file) for _, several in found for file in several if os.path.isfile(file)})
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    return FolderSource(Path(root), tuple(os.path.relpath(file, root) for file in files))


def tables_within(
    source: str, files: Source, listing: Listing, columns: SaidColumns, scratch: Scratch
) -> TableSource | None:
    """None where there are none. InputError where there are several kinds, or images beside them."""
    names = [entry.path for entry in listing.rejected if entry.reason == "not_an_image"]
    kinds = _kinds(names)
    if listing.images:
        kinds = [kind for kind in kinds if kind != "parquet"]  # they may say something about the images
    if not kinds:
        return None
    if listing.images:
        image = listing.images[0].path
        raise InputError(
            f"{source}: holds {WORDS[kinds[0]]} and images, such as {image}; name a folder with one of them"
        )
    for key, column in columns._asdict().items():
        if column is not None and (kinds[0], key) in NO_COLUMNS:
            raise InputError(f"{source}: {key}_column: {column}: {WORDS[kinds[0]]} have no columns; leave the key out")
    if len(kinds) > 1:
        both = " and ".join(WORDS[kind] for kind in kinds)
        raise InputError(f"{source}: holds {both}; name the folder of one kind")
    folder = scratch.folder()
    if isinstance(files, FolderSource):
        return TableSource(files.root.absolute(), kinds[0], folder, columns, str(files.root), files.only)
    _fetch(source, files, _needed(kinds[0], names), folder / "fetched")
    return TableSource(folder / "fetched", kinds[0], folder, columns, source)


def _kinds(names: Sequence[str]) -> list[Kind]:
    found = {
        "idx": find_idx(names),
        "CIFAR": find_cifar(names),
        "parquet": find_parquet(names),
        "saved": saved_folders(names),
    }
    return [kind for kind, tables in found.items() if tables]


def _needed(kind: Kind, names: Sequence[str]) -> list[str]:
    match kind:
        case "idx":
            return [name for name in names if "idx" in name.lower()]
        case "CIFAR":
            folders = {batch.folder for batch in find_cifar(names)}
            return [name for name in names if os.path.dirname(name) in folders]
        case "parquet":
            return find_parquet(names)
        case "saved":
            return [name for name in names if name.startswith(tuple(saved_folders(names)))]


def _fetch(source: str, files: Source, names: Sequence[str], folder: Path) -> None:
    for name in names:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{source}: {name}: its name is a way out of the folder; unpack it yourself")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(files, ObjectSource):
                with open_random(files.root / name) as remote, open(path, "wb") as file:
                    shutil.copyfileobj(remote, file, PIECE_BYTES)
            else:
                path.write_bytes(files.read(name))
        except ImageFault as fault:
            raise InputError(f"{source}: {name}: {fault.detail}; download or unpack it and give the folder") from None
        except OSError as error:
            if error.errno in DISK_FULL:
                raise InputError(f"{folder}: no room for {name} ({error.strerror}); give the folder of it") from None
            raise InputError(f"{source}: {name}: cannot be read ({error.strerror or error})") from None
