"""What an archive holds, before it is read: an entry's name made a path, and where its bytes lie.

Nothing is ever unpacked to a path that an archive names, so a name is no danger to this machine. It becomes part of a
dataset, though, and the next program may join it to a folder: `./a`, `/a` and `C:/a` become `a`, and a name that climbs
by `..` is an image's alone: it gets a safe key like all others, `..` is no class, and `source` says the name as it was.
"""

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

ROW = np.dtype(
    [
        ("path", "<u8"),  # hash of the path; rows are sorted by it
        ("archive", "<u4"),
        ("offset", "<u8"),  # of the data in a tar, of the local header in a zip
        ("stored", "<u8"),  # bytes in the archive
        ("bytes", "<u8"),
        ("crc32", "<u4"),
        ("method", "<u2"),
        ("name_bytes", "<u2"),  # of a zip's entry: its header is longer by so much
    ]
)  # fmt: skip
PLAIN = 0xFFFF  # a tar's member: just bytes at an offset
STORED, DEFLATED = 0, 8  # methods of a zip


class Entry(NamedTuple):
    """A file in an archive. `fault` says why it cannot be read; `stamp` changes with the content."""

    name: str
    offset: int
    stored: int
    bytes: int
    stamp: int
    crc32: int = 0
    method: int = PLAIN
    name_bytes: int = 0
    fault: str | None = None


def safe_path(name: str) -> str | None:
    """The entry's path, relative and with slashes; None for one that has none or leaves the archive."""
    parts = [part for part in re.sub(r"^[A-Za-z]:(?=[\\/])", "", name).split("/") if part not in ("", ".")]
    return None if not parts or ".." in parts or "\0" in name else "/".join(parts)


def climbing_path(name: str) -> str | None:
    """The path of an entry that climbs by `..`, as it is; None for one that holds no path."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join(parts) if ".." in parts[:-1] and parts[-1] != ".." and "\0" not in name else None


def path_hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def table_of(rows: Iterable[tuple[int, ...]], count: int) -> np.ndarray:
    """An array of `ROW`, sorted; 45 bytes an entry, so that a million of them are no burden."""
    table = np.fromiter(rows, dtype=ROW, count=count)
    table.sort(order="path")
    return table


def row_of(table: np.ndarray, path: str) -> np.void | None:
    wanted = path_hash(path)
    at = int(np.searchsorted(table["path"], np.uint64(wanted)))
    return table[at] if at < len(table) and int(table["path"][at]) == wanted else None
