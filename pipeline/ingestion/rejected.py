"""Why a file of a source is not in the dataset. The list of reasons is closed: other programs count them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from pipeline.shards.atomic import sync_directory, write_file
from pipeline.shards.certificate import REJECTED_NAME
from pipeline.shards.index import INDEX_NAME

Reason = Literal[
    "not_an_image",  # neither its name nor its first bytes say image; a README, a labels file, Thumbs.db
    "read_as_labels",  # a table's labels or names of classes, which are in the dataset
    "hidden",  # an image in a folder whose name begins with a dot: .git, .cache
    "repeated_link",  # a link to a folder that holds it, so that all below it is there already
    "duplicate",  # a copy of another image, left out because the config says `duplicates: remove`
    "outside_splits",  # an image in no split folder or list
    "unreadable_file",  # the file system refuses it, or it is no regular file; of an archive: encrypted, a link ...
    "unsafe_name",  # of an archive's entry: climbs out of it (`../`), or holds no path
    "repeated_name",  # of an archive's entry: there again further on, and the last one stands
    "empty_file",
    "file_too_large",
    "unknown_format",
    "broken_image",
    "too_many_pixels",  # more than `max_pixels`
    "too_slow",  # its decoder did not return within `max_image_seconds`
    "too_much_memory",
    "decoder_crashed",  # the process that decoded it ended: a fault in the decoder that this file meets
    "unsupported_mode",  # pixels without an agreed meaning as RGB (float, Lab), or that .png cannot hold
    "no_mask",  # `masks` has none of its name
    "mask_without_image",
    "bad_mask",  # no .png of class numbers, of another size than the image, or with classes that have no name
    "bad_box",  # outside of the image, or without an area
    "no_image",  # adopted tars, from here on: a sample without an image
    "several_images",  # more than one image under one key
    "split_sample",  # a key that comes back after other samples: one half of it
    "needs_rewriting",  # plain decoding would show it wrong (rotated, transparent, 16 bit), and tars are not rewritten
]
UNCOUNTED = (  # nobody meant these to be training images
    *("not_an_image", "read_as_labels", "hidden", "repeated_link"),
    *("duplicate", "outside_splits"),
)


@dataclass(frozen=True, slots=True)
class Rejected:
    """One line of rejected.jsonl."""

    path: str
    reason: Reason
    detail: str

    def __post_init__(self) -> None:
        assert self.reason in get_args(Reason), self.reason


def num_counted(rejected: Iterable[Rejected]) -> int:
    """How many count against `max_rejected_fraction`."""
    return sum(entry.reason not in UNCOUNTED for entry in rejected)


def reasons(rejected: Iterable[Rejected]) -> dict[str, int]:
    return dict(sorted(Counter(entry.reason for entry in rejected).items()))


def rejected_lines(rejected: Iterable[Rejected]) -> bytes:
    """The content of rejected.jsonl, sorted by path."""
    ordered = sorted(rejected, key=lambda entry: (entry.path, entry.reason))
    return b"".join(json.dumps(asdict(entry)).encode() + b"\n" for entry in ordered)


def write_rejected(directory: Path, rejected: Iterable[Rejected]) -> str:
    """Its SHA-256. Where it becomes another one, the index that is there, which vouches for it, is removed first."""
    path, content = directory / REJECTED_NAME, rejected_lines(rejected)
    if not path.is_file() or path.read_bytes() != content:
        (directory / INDEX_NAME).unlink(missing_ok=True)
        sync_directory(directory)
        write_file(path, content)
    return hashlib.sha256(content).hexdigest()
