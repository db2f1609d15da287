"""Rows of tables as entries of a listing."""

import re
from collections.abc import Iterable, Sequence

from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import Listing, SourceFile

HASH_BITS = (1 << 63) - 1  # stamps fit into a signed 64-bit number
ROW_PATH = re.compile(r"(?P<table>.+)/(?P<row>\d{6,})(?:/[^/]*[^/\d][^/]*)?")
MAX_NAME = 100
MOST_LABEL = 99_999  # a larger number is no class, and would make as many


def row_path(table: str, number: int, name: str | None = None) -> str:
    """`table/000123`, and the name that the table gives to the image, where that helps to find it again."""
    name = (name or "").replace("\\", "/").rpartition("/")[2]
    plain = name.isprintable() and len(name) <= MAX_NAME and name not in (".", "..") and not name.isdigit()
    return f"{table}/{number:06d}/{name}" if name and plain else f"{table}/{number:06d}"


def row_of_path(path: str) -> tuple[str, int]:
    """(table, number)"""
    match = ROW_PATH.fullmatch(path)
    assert match is not None, path
    return match["table"], int(match["row"])


def add_row(
    listing: Listing, table: str, number: int, size: int, stamp: int, label: int | str | None, split: str | None,
    name: str | None = None,
) -> None:  # fmt: skip
    path = row_path(table, number, name)
    listing.images.append(SourceFile(path, size, stamp))
    if label is not None:
        listing.labels[path] = label
    if split is not None:
        listing.splits[path] = split


def reject_rest(listing: Listing, names: Iterable[str], detail: str) -> None:
    listing.rejected += [Rejected(name, "not_an_image", detail) for name in names]


def numbered_classes(labels: Iterable[int], names: Sequence[str] = ()) -> tuple[str, ...] | None:
    """The names, or where there are none the numbers; None without labels."""
    largest = max(labels, default=None)
    if largest is None:
        return None
    return tuple(names) or tuple(map(str, range(largest + 1)))
