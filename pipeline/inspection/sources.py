"""Which images an inspection looks at, and where its pictures go: what can be said before anything runs. Torch-free."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pipeline.errors import InputError
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.inspection.page import MARK, PAGE
from pipeline.shards.index import INDEX_NAME
from pipeline.storage.location import is_url

ItemT = TypeVar("ItemT")


def dataset_of(source: Sequence[str]) -> str | None:
    """The one dataset directory that was named; None where images were. InputError where both were."""
    datasets = [path for path in source if is_url(path) or (Path(path) / INDEX_NAME).is_file()]
    if datasets and len(source) > 1:
        raise InputError(f"IMAGES `{datasets[0]}` is a dataset: name it alone, or images only")
    return datasets[0] if datasets else None


def absolute(path: str) -> str:
    """A path as it means something elsewhere too; a URL as it is."""
    return path if is_url(path) else str(Path(path).expanduser().absolute())


def image_files(source: Sequence[str]) -> list[str]:
    """Every image that folders, globs and files name, each once, in order. InputError where one names none."""
    found: dict[str, None] = {}
    for name in source:
        files = _files_of(name)
        if not files:
            raise InputError(f"IMAGES `{name}`: holds no image; name a dataset, a folder, a glob or image files")
        found |= dict.fromkeys(files)
    return list(found)


def _files_of(name: str) -> list[str]:
    path = Path(name)
    if path.is_dir():
        return [str(path / file.path) for file in FolderSource(path).list_files().images]
    if path.exists():
        return [name]
    matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if not matches:
        raise InputError(f"IMAGES `{name}`: there is no such file, folder or dataset")
    return [match for match in matches if Path(match).is_file()]


def spread(items: Sequence[ItemT], count: int) -> list[ItemT]:
    """At most `count` of them, evenly spread, from the first on."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def require_destination(path: Path) -> None:
    """InputError where `path` is neither new, nor empty, nor an earlier inspection's."""
    if path.exists() and not path.is_dir():
        raise InputError(f"DEST `{path}` is a file; name a folder for the pictures")
    page = path / PAGE
    if page.is_file() and MARK in page.read_text(errors="replace"):
        return
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"DEST `{path}` is not empty and holds no earlier inspection; name a new folder")
