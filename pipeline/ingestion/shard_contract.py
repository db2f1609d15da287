"""What whoever makes a shard promises, whatever it is made from, and the summary that is kept of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from pipeline.ingestion.counts import ImageCounts
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.index import Shard

JOB_VERSION = 2  # raise it when the same file would become another sample


@dataclass(frozen=True)
class ShardSummary:
    """What is known of a finished shard; `shard` is None where not one of its files was taken.

    `content` is the sum of its sample digests, in hex. The journal keeps summaries, so they hold JSON's types only.
    """

    name: str
    split: str
    files: int
    shard: Shard | None
    content: str
    totals: ImageTotals
    rejected: list[Rejected] = field(default_factory=list)
    mask_classes: int = 0  # one more than the greatest class of its masks
    counts: ImageCounts | None = None  # None of a shard that an earlier version made
    job: str = ""  # key of its job before copies were left out


class ShardJob(Protocol):
    """Something picklable that makes one shard, whole or not at all."""

    name: str
    split: str
    num_files: int
    num_bytes: int

    def key(self) -> str:
        """The same for the same inputs: a finished job with this key need not run again."""

    def run(self, destination: Path) -> ShardSummary: ...

    def without(self, left_out: Sequence[int]) -> Self:
        """The same job with the images of these files, by their numbers, left out as copies."""

    def path(self, number: int) -> str:
        """What a file is called in rejected.jsonl."""

    def where(self, number: int) -> str:
        """What is read for a file, told without reading anything."""

    def numbers_of(self, keys: Sequence[str]) -> list[int]:
        """The file of each sample of its shard, by its key."""

    def stored(self, number: int) -> bytes:
        """What is or would be stored of one file's image; ImageFault where it cannot be taken."""


def key_without(key: str, left_out: Sequence[int]) -> str:
    """The key of a job that leaves out these of its files."""
    return hashlib.sha256(repr((key, left_out)).encode()).hexdigest() if left_out else key
