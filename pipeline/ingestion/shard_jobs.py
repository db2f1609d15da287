"""The unit of ingestion: one shard, made by one worker from its own files, and the summary that is kept of it."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from pipeline.errors import DISK_FULL
from pipeline.ingestion.annotations import AnnotationRule, MaskFile, PreparedAnnotations, prepare_annotations
from pipeline.ingestion.images import PreparedImage, prepare_image
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import Source
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.annotations import Box
from pipeline.shards.decoding import ImageFault
from pipeline.shards.fingerprint import content_sum, sample_digest
from pipeline.shards.index import Shard
from pipeline.shards.table import NO_LABEL
from pipeline.shards.writer import NewSample, write_shard

JOB_VERSION = 1  # raise it when the same file would become another sample
ANNOTATIONS_VERSION = 2  # the same of its mask and boxes
MAX_SLUG = 60  # with hash and ".json" within the 100 characters of a plain tar header


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


class ShardJob(Protocol):
    """Something picklable that makes one shard, whole or not at all."""

    name: str
    split: str
    num_files: int
    num_bytes: int

    def key(self) -> str:
        """The same for the same inputs: a finished job with this key need not run again."""

    def run(self, destination: Path) -> ShardSummary: ...


class Candidate(NamedTuple):
    """A file that goes into a shard if it holds an image."""

    path: str
    bytes: int
    stamp: int
    label: int = NO_LABEL
    class_name: str | tuple[str, ...] | None = None  # several of a dataset with label sets
    mask: MaskFile | None = None
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class WriteShard:
    """A shard from files of a source, in the order given."""

    name: str
    split: str
    source: Source
    candidates: tuple[Candidate, ...]
    channels: str
    rule: AnnotationRule = AnnotationRule()

    @property
    def num_files(self) -> int:
        return len(self.candidates)

    @property
    def num_bytes(self) -> int:
        return sum(candidate.bytes for candidate in self.candidates)

    def key(self) -> str:
        plain = [tuple(candidate)[: Candidate._fields.index("mask")] for candidate in self.candidates]
        content = repr((JOB_VERSION, self.channels, plain))  # without annotations as before there were any
        if self.rule.asks:
            annotations = [(candidate.mask, candidate.boxes) for candidate in self.candidates]
            content += repr((ANNOTATIONS_VERSION, self.rule, annotations))
        return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()

    def run(self, destination: Path) -> ShardSummary:
        rejected: list[Rejected] = []
        digests: list[int] = []
        totals, mask_classes = ImageTotals(), [0]
        table = write_shard(destination / self.name, self._samples(rejected, digests, totals, mask_classes))
        shard = None
        if table is not None:
            labelled = int((table.records["label"] != NO_LABEL).sum())
            shard = Shard(self.name, table.shard_bytes, table.shard_sha256, len(table), labelled)
        return ShardSummary(
            self.name, self.split, self.num_files, shard, f"{content_sum(digests):064x}", totals, rejected,
            max(mask_classes),
        )  # fmt: skip

    def _samples(
        self, rejected: list[Rejected], digests: list[int], totals: ImageTotals, mask_classes: list[int]
    ) -> Iterator[NewSample]:
        """One file at a time, so a worker holds one image; the arguments are filled on the way."""
        for candidate in self.candidates:
            try:
                content = _read(self.source, candidate.path)
                image = prepare_image(content, self.channels)
                size = image.width, image.height
                annotations = prepare_annotations(self.rule, candidate.mask, candidate.boxes, content, size)
            except ImageFault as fault:
                rejected.append(Rejected(candidate.path, fault.reason, fault.detail))
                continue
            sha256 = hashlib.sha256(image.content)
            digests.append(sample_digest(sha256.digest(), candidate.label, annotations.digested))
            totals.add(image)
            mask_classes.append(annotations.classes)
            record = _record(candidate, image, sha256.hexdigest(), annotations)
            key = sample_key(candidate.path)
            yield NewSample(key, image.extension, image.content, record, candidate.label, annotations.mask)


def _read(source: Source, path: str) -> bytes:
    try:
        content = source.read(path)
    except OSError as error:
        if error.errno in DISK_FULL:  # of a spool; no file's fault
            raise
        raise ImageFault("unreadable_file", error.strerror or str(error)) from None
    if not content:
        raise ImageFault("empty_file", "0 bytes")
    return content


def _record(
    candidate: Candidate, image: PreparedImage, sha256: str, annotations: PreparedAnnotations
) -> dict[str, object]:
    record: dict[str, object] = {
        "source": candidate.path,
        "width": image.width,
        "height": image.height,
        "sha256": sha256,
    }
    if candidate.label != NO_LABEL:
        several = isinstance(candidate.class_name, tuple)
        record |= {"label": candidate.label}
        record |= {"classes": list(candidate.class_name)} if several else {"class": candidate.class_name}
    if image.changes:
        record["changes"] = list(image.changes)
    if annotations.mask is not None:
        record["mask_sha256"] = hashlib.sha256(annotations.mask).hexdigest()
    if annotations.boxes is not None:
        record["boxes"] = annotations.boxes
    return record


def sample_key(path: str) -> str:
    """A key that any tar program and webdataset take: a readable part and 64 bits of a hash of the whole path."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", os.path.splitext(path)[0]).strip("-")[-MAX_SLUG:].strip("-")
    digest = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return f"{readable}-{digest}" if readable else digest


def order_key(seed: int, path: str) -> bytes:
    """Files sorted by it are in the order of the dataset: shuffled, and the same wherever the source lies."""
    return hashlib.blake2b(f"{seed}:{path}".encode(errors="surrogateescape"), digest_size=16).digest()
