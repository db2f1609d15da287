"""`tombstones.jsonl` of a dataset: samples that no run may read from now on, for whatever reason they were taken down.

One JSON object a line, only ever appended: {key, split, shard, sha256, date, reason}. The sample's bytes stay in its
tar, the index and the fingerprint stay what they are, so runs that have begun go on in their order; readers leave the
sample out (`ShardReader.left_out`). That the file only grows lets a run say which lines held by their number and hash.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import InputError
from pipeline.storage.location import Location, read_bytes

TOMBSTONES_NAME = "tombstones.jsonl"


@dataclass(frozen=True)
class Tombstone:
    """One sample taken down: its key, where it lay when that was said, and why. `date` is ISO 8601."""

    key: str
    split: str
    shard: str
    sha256: str
    date: str
    reason: str


def read_tombstones(directory: Location) -> tuple[Tombstone, ...]:
    """The list of a dataset; none where there is no file. InputError for a line that is no tombstone.

    A sample that silently came back into training would be worse than a run that does not start.
    """
    path = directory / TOMBSTONES_NAME
    try:
        lines = read_bytes(path).decode().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it") from None
    return tuple(_parse(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip())


def _parse(line: str, where: str) -> Tombstone:
    try:
        stone = Tombstone(**json.loads(line))
        if not all(isinstance(value, str) for value in asdict(stone).values()):
            raise TypeError("a value that is no text")
        return stone
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{where}: no tombstone ({error}); each line is {{key, split, shard, sha256, date, reason}}, all text: "
            "mend it"
        ) from None


def add_tombstone(directory: Path, stone: Tombstone) -> bool:
    """Append to the list, on disk when this returns; False where the sample is there already."""
    if any((other.split, other.shard, other.key) == (stone.split, stone.shard, stone.key)
           for other in read_tombstones(directory)):  # fmt: skip
        return False
    path = directory / TOMBSTONES_NAME
    torn = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with open(path, "a") as file:
        file.write(("\n" if torn else "") + json.dumps(asdict(stone)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def today() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def tombstones_sha256(stones: Sequence[Tombstone]) -> str | None:
    """Of what is left out, whatever the reasons; None where nothing is."""
    if not stones:
        return None
    text = "\n".join(f"{stone.split}\t{stone.shard}\t{stone.key}" for stone in stones)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
