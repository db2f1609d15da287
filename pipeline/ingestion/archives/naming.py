"""Which files the name of a source stands for where it names archives: braces, globs, paths and URLs."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from pipeline.errors import InputError
from pipeline.shards.index import shortened
from pipeline.storage.location import Location, is_file, is_url, location, matching

ZIP_SUFFIX, TAR_SUFFIX = ".zip", ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
TAR_SUFFIXES = (TAR_SUFFIX, *COMPRESSED_SUFFIXES)
REQUESTS = 16  # at once, to see which archives are there


def names_archives(source: str) -> bool:
    """Whether this is the name or the pattern of archives, rather than of a folder (`x.zip/` is one, too)."""
    return _kind(next(expand_braces(source))) is not None and not os.path.isdir(source)


def is_compressed(where: Location) -> bool:
    return where.name.lower().endswith(COMPRESSED_SUFFIXES)


def is_zip(where: Location | str) -> bool:
    return str(where).lower().endswith(ZIP_SUFFIX)


def _kind(name: str) -> str | None:
    return next((suffix for suffix in (ZIP_SUFFIX, *TAR_SUFFIXES) if name.lower().endswith(suffix)), None)


def stem(name: str) -> str:
    """The archive's name without what says that it is one."""
    return name[: -len(_kind(name) or "")] if _kind(name) else name


def expand_archives(source: str) -> list[Location]:
    """The archives of a path or URL with braces (`{000..012}`, `{a,b}`) and globs, sorted.

    InputError if one is missing, or where they are of several kinds.
    """
    patterns = [source] if not is_url(source) and os.path.isfile(source) else list(expand_braces(source))
    if others := [pattern for pattern in patterns if _kind(pattern) is None]:
        raise InputError(f"{others[0]}: neither a .zip nor a .tar, as `{patterns[0]}` is; name archives of one kind")
    with ThreadPoolExecutor(REQUESTS) as requests:
        found = list(requests.map(_files_of_pattern, patterns))
    missing = [pattern for pattern, files in zip(patterns, found, strict=True) if not files]
    if missing:
        raise InputError(*shortened([f"{pattern}: no such {_word(pattern)}" for pattern in missing]))
    archives = sorted({location(file) for files in found for file in files}, key=str)
    if len({is_zip(archive) for archive in archives}) > 1:
        raise InputError(f"{source}: zips and tars in one source; ingest the ones, then the others")
    return archives


def _files_of_pattern(pattern: str) -> list[str]:
    if is_url(pattern):
        pattern = str(location(pattern))  # which refuses a password
    else:
        pattern = os.path.abspath(location(pattern))
    if is_file(location(pattern)):
        return [pattern]
    return [file for file in matching(pattern) if _kind(file)] if glob.has_magic(pattern) else []


def _word(pattern: str) -> str:
    return "zip" if _kind(pattern) == ZIP_SUFFIX else "tar"


def expand_braces(pattern: str) -> Iterator[str]:
    if not (match := re.search(r"\{([^{}]*)\}", pattern)):
        yield pattern
        return
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        choices: Iterator[str] | list[str] = (
            str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)
        )
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def shown_names(archives: Sequence[Location]) -> dict[Location, str]:
    """The name of each archive, with the folders below the one that holds all, so that no two are alike."""
    folders = [PurePosixPath(str(archive)).parts[:-1] for archive in archives]
    shared = len(os.path.commonprefix(folders))
    return {
        archive: "/".join((*folder[shared:], archive.name)) for folder, archive in zip(folders, archives, strict=True)
    }


def prefixes(archives: Sequence[Location]) -> list[str]:
    """What begins the paths of each archive's entries: nothing for one archive, else its path from where all lie,
    without its suffix unless two would be the same."""
    if len(archives) == 1:
        return [""]
    names = list(shown_names(archives).values())
    counts = Counter(map(stem, names))
    return [stem(name) if counts[stem(name)] == 1 else name for name in names]


def count_up(archives: Sequence[Location]) -> bool:
    """Whether the names are a series of numbers, as of shards: `set-000.tar`, `set-001.tar`, with no gap."""
    numbers = [re.findall(r"\d+", stem(archive.name)) for archive in archives]
    if not all(numbers):
        return False
    last = sorted({int(found[-1]) for found in numbers})
    return last == list(range(last[0], last[-1] + 1))
