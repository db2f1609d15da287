"""The unit of ingestion: one shard, made by one worker from its own files."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from pipeline.errors import DISK_FULL
from pipeline.ingestion.counts import CountedImages
from pipeline.ingestion.duplicates.hash_file import ExaminedImages
from pipeline.ingestion.images import ImageRule, PreparedImage, prepare_image
from pipeline.ingestion.isolation import held
from pipeline.ingestion.labelling.annotations import (
    AnnotationRule,
    FoundAnnotations,
    MaskFile,
    PreparedAnnotations,
    prepare_annotations,
)
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.shard_contract import JOB_VERSION, ShardSummary, key_without
from pipeline.ingestion.sources.listing import Source, SourceFiles
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.annotations import Box
from pipeline.shards.decoding import ImageFault
from pipeline.shards.fingerprint import content_sum, sample_digest
from pipeline.shards.index import Shard
from pipeline.shards.table import NO_LABEL
from pipeline.shards.writer import Expected, NewSample, write_shard

ANNOTATIONS_VERSION = 2  # the same of its mask and boxes
UNSAFE = re.compile(r"[^A-Za-z0-9_]+")
MOST_EXPECTED_BYTES = 1 << 33
MAX_SLUG = 60  # with hash and ".json" within the 100 characters of a plain tar header


class Candidate(NamedTuple):
    """A file that goes into a shard if it holds an image."""

    path: str
    bytes: int
    stamp: int
    label: int = NO_LABEL
    class_name: str | tuple[str, ...] | None = None  # several of a dataset with label sets
    mask: MaskFile | None = None
    boxes: tuple[Box, ...] = ()


ClassNames = Mapping[int, str | tuple[str, ...]]


@dataclass(frozen=True)
class CandidateColumns:
    """The candidates of a plan, whose shards are ranges of them. `labels` is (files,) int32, `class_names` by label."""

    files: SourceFiles
    labels: np.ndarray
    class_names: ClassNames
    annotations: FoundAnnotations

    def between(self, start: int, stop: int) -> Iterator[Candidate]:
        files, labels = self.files, self.labels[start:stop].tolist()
        columns = files.paths[start:stop], files.bytes[start:stop], files.stamps[start:stop], labels
        class_name, mask, boxes = self.class_names.get, self.annotations.masks.get, self.annotations.boxes.get
        for path, num_bytes, stamp, label in zip(*columns, strict=True):
            yield Candidate(path, num_bytes, stamp, label, class_name(label), mask(path), boxes(path, ()))


class CandidateRange(Sequence[Candidate]):
    """The candidates of one shard, made of the plan's columns when they are asked for; pickled as a tuple of them."""

    def __init__(self, columns: CandidateColumns, start: int, stop: int):
        self._columns, self._numbers = columns, range(start, stop)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Candidate:
        at = self._numbers[number]
        return next(self._columns.between(at, at + 1))

    def __iter__(self) -> Iterator[Candidate]:
        return self._columns.between(self._numbers.start, self._numbers.stop)

    def __reduce__(self) -> tuple:
        return tuple, (list(self),)

    @property
    def num_bytes(self) -> int:
        return sum(self._columns.files.bytes[self._numbers.start : self._numbers.stop])


@dataclass(frozen=True)
class WriteShard:
    """A shard from files of a source, in the order given."""

    name: str
    split: str
    source: Source
    candidates: Sequence[Candidate]
    channels: str
    rule: AnnotationRule = AnnotationRule()
    images: ImageRule = ImageRule()
    left_out: tuple[int, ...] = ()  # copies of other images, by their numbers among the candidates

    def __getstate__(self) -> dict[str, object]:
        """Sent to a worker, a source that lists what it holds goes with the places of this shard's files alone."""
        state = dict(self.__dict__)
        if hasattr(self.source, "narrowed"):
            state["source"] = self.source.narrowed([candidate.path for candidate in self.candidates])
        return state

    @property
    def num_files(self) -> int:
        return len(self.candidates)

    @property
    def num_bytes(self) -> int:
        if isinstance(self.candidates, CandidateRange):
            return self.candidates.num_bytes
        return sum(candidate.bytes for candidate in self.candidates)

    def key(self) -> str:
        return key_without(self._whole_key, self.left_out)

    @cached_property
    def _whole_key(self) -> str:
        plain = [tuple(candidate)[: Candidate._fields.index("mask")] for candidate in self.candidates]
        content = repr((JOB_VERSION, self.channels, plain))  # without annotations as before there were any
        if self.rule.asks:
            annotations = [(candidate.mask, candidate.boxes) for candidate in self.candidates]
            content += repr((ANNOTATIONS_VERSION, self.rule, annotations))
        if self.images != ImageRule():
            content += repr(self.images)
        return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()

    def without(self, left_out: Sequence[int]) -> Self:
        return replace(self, left_out=tuple(left_out))

    def path(self, number: int) -> str:
        return self.candidates[number].path

    def where(self, number: int) -> str:
        return self.path(number)

    def numbers_of(self, keys: Sequence[str]) -> list[int]:
        numbers = {sample_key(candidate.path): number for number, candidate in enumerate(self.candidates)}
        return [numbers[key] for key in keys]

    def stored(self, number: int) -> bytes:
        return prepare_image(_read(self.source, self.candidates[number].path), self.channels, self.images).content

    def run(self, destination: Path) -> ShardSummary:
        made = _Made()
        table = write_shard(destination / self.name, self._samples(made), self._expected())
        shard = None
        if table is not None:
            labelled = int((table.records["label"] != NO_LABEL).sum())
            shard = Shard(self.name, table.shard_bytes, table.shard_sha256, len(table), labelled)
        job = self._whole_key
        if self.images.examine == "pixels":
            made.examined.write(destination, self.name, shard, job)
        return ShardSummary(
            self.name, self.split, self.num_files, shard, f"{content_sum(made.digests):064x}", made.totals,
            made.rejected, made.mask_classes, made.counted.counts(), job,
        )  # fmt: skip

    def _expected(self) -> Expected | None:
        """None where images are made anew, most of them smaller than their files, and of an uncommonly large shard, as
        one of its files may be no image."""
        made_anew = self.images.max_side is not None or self.images.format is not None
        return None if made_anew or self.num_bytes > MOST_EXPECTED_BYTES else Expected(self.num_files, self.num_bytes)

    def _samples(self, made: "_Made") -> Iterator[NewSample]:
        """One file at a time, so a worker holds one image; `made` is filled on the way."""
        raw = getattr(self.source, "raw_form", None)
        for number, candidate in enumerate(self.candidates):
            kept = number not in self.left_out
            try:
                with held(number) as start_clock:
                    content = _read(self.source, candidate.path)
                    start_clock()
                    image = prepare_image(content, self.channels, self.images)
                    annotations = self._annotations(candidate, content, image)
                    sha256 = hashlib.sha256(image.content)
                    if self.images.examine == "pixels":
                        made.examined.add(number, candidate.label, image, sha256.digest(), kept=kept)
            except ImageFault as fault:
                made.rejected.append(Rejected(candidate.path, fault.reason, fault.detail))
                continue
            if not kept:
                continue
            made.digests.append(sample_digest(sha256.digest(), candidate.label, annotations.digested))
            made.totals.add(image)
            made.counted.add(image if raw is None else as_of_raw(image, raw))
            made.mask_classes = max(made.mask_classes, annotations.classes)
            record = _record(candidate, image, sha256.hexdigest(), annotations)
            key = sample_key(candidate.path)
            yield NewSample(key, image.extension, image.content, record, candidate.label, annotations.mask)

    def _annotations(self, candidate: Candidate, content: bytes, image: PreparedImage) -> PreparedAnnotations:
        size = image.width, image.height
        sizes = (size,) if image.upright_size is None else (image.upright_size, size)
        return prepare_annotations(self.rule, candidate.mask, candidate.boxes, content, *sizes)


def as_of_raw(image: PreparedImage, form: str) -> PreparedImage:
    """For the counts: the source holds pixels in this form, and no file of its own."""
    return image._replace(format=form, changes=("raw pixels encoded", *image.changes))


@dataclass
class _Made:
    """What a job knows of its shard so far."""

    rejected: list[Rejected] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    totals: ImageTotals = field(default_factory=ImageTotals)
    mask_classes: int = 0
    counted: CountedImages = field(default_factory=CountedImages)
    examined: ExaminedImages = field(default_factory=ExaminedImages)


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
        record["label"] = candidate.label
        if isinstance(candidate.class_name, tuple):
            record["classes"] = list(candidate.class_name)
        else:
            record["class"] = candidate.class_name
    if image.changes:
        record["changes"] = list(image.changes)
    if annotations.mask is not None:
        record["mask_sha256"] = hashlib.sha256(annotations.mask).hexdigest()
    if annotations.boxes is not None:
        record["boxes"] = annotations.boxes
    return record


def sample_key(path: str) -> str:
    """A key that any tar program and webdataset take: a readable part and 64 bits of a hash of the whole path."""
    readable = UNSAFE.sub("-", os.path.splitext(path)[0]).strip("-")[-MAX_SLUG:].strip("-")
    digest = hashlib.blake2b(path.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return f"{readable}-{digest}" if readable else digest


def order_keys(seed: int, paths: Sequence[str]) -> np.ndarray:
    """(files, 2) uint64. Files sorted by it, the first column before the second, are in the order of the dataset:
    shuffled, and the same wherever the source lies."""
    digests, start = bytearray(), f"{seed}:".encode()
    for path in paths:
        digests += hashlib.blake2b(start + path.encode(errors="surrogateescape"), digest_size=16).digest()
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
