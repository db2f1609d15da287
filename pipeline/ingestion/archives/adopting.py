"""Adopts one existing tar in place: reads its images, hashes it whole, and writes only its table.

The tar is not rewritten, so an image that a plain decoder would show wrong (rotated, transparent, 16 bit) is rejected
rather than corrected; the table leaves it out.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from zlib_ng.zlib_ng import crc32

from pipeline.ingestion.archives.tars import LabelRule, TarMember, TarSample, tar_samples
from pipeline.ingestion.counts import CountedImages
from pipeline.ingestion.duplicates.hash_file import ExaminedImages
from pipeline.ingestion.images import (
    ImageRule,
    PreparedImage,
    decode_image,
    image_size,
    pixel_moments,
    prepare_by_header,
)
from pipeline.ingestion.isolation import held
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.shard_contract import JOB_VERSION, ShardSummary, key_without
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.atomic import TEMPORARY_PREFIX
from pipeline.shards.decoding import ImageFault
from pipeline.shards.fingerprint import content_sum, sample_digest
from pipeline.shards.index import Shard, table_name
from pipeline.shards.table import NO_LABEL, RECORD, ShardTable, write_table
from pipeline.storage.location import Location, read_range, size_of, stamp_of, stream
from pipeline.storage.random_access import PathFile, open_random

HARMLESS_CHANGES = ("first frame", "from")  # a decoder shows the first frame of any of the formats


@dataclass(frozen=True)
class AdoptTar:
    """The shard job of one tar. `name` is what its shard is called in the dataset; `tar` is where it stays."""

    name: str
    split: str
    tar: Location
    num_files: int
    rule: LabelRule
    channels: str
    images: ImageRule = ImageRule()
    shown: str = ""  # how paths in the tar begin, where its name alone may be another's too
    left_out: tuple[int, ...] = ()  # copies of other images, by their numbers among the samples

    @property
    def num_bytes(self) -> int:
        return size_of(self.tar)

    @property
    def _shown(self) -> str:
        return self.shown or self.tar.name

    def key(self) -> str:
        return key_without(self._whole_key(), self.left_out)

    def without(self, left_out: Sequence[int]) -> Self:
        return replace(self, left_out=tuple(left_out))

    def path(self, number: int) -> str:
        return f"{self._shown}/{_places_in(self.tar, stamp_of(self.tar)).key(number)}"

    def where(self, number: int) -> str:
        return str(self.tar)

    def numbers_of(self, keys: Sequence[str]) -> list[int]:
        places = _places_in(self.tar, stamp_of(self.tar))
        numbers = {places.key(number): number for number in range(len(places.ends))}
        return [numbers[key] for key in keys]

    def stored(self, number: int) -> bytes:
        offset, size = _places_in(self.tar, stamp_of(self.tar)).images[number].tolist()
        if not size:
            raise ImageFault("no_image", "no sample of one image")
        return read_range(self.tar, offset, size)

    def _whole_key(self) -> str:
        content = (JOB_VERSION, str(self.tar), size_of(self.tar), stamp_of(self.tar), self.channels, self.rule)
        content += () if self.images == ImageRule() else (self.images,)
        content += () if self._shown == self.tar.name else (self.shown,)
        return hashlib.sha256(repr(content).encode(errors="surrogateescape")).hexdigest()

    def run(self, destination: Path) -> ShardSummary:
        with _at_hand(self.tar, destination) as file:
            return self._adopt(file, destination)

    def _adopt(self, tar: PathFile, destination: Path) -> ShardSummary:
        tables = _TableOfTar(with_hashes=self.images.examine == "pixels")
        rejected: list[Rejected] = []
        seen: set[str] = set()
        number = -1
        for sample in tar_samples(tar, str(self.tar)):
            if isinstance(sample, TarMember):
                rejected.append(self._rejected(sample.name, "not_an_image", "belongs to no sample"))
                continue
            number += 1
            try:
                with held(number) as start_clock:
                    if fault := sample.fault(sample.key in seen):
                        raise ImageFault(*fault)
                    image = sample.images()[0]
                    content = image.read(tar)
                    start_clock()
                    prepared, label = self._decode(content), self.rule.label(sample, tar)
                    tables.add(sample, image, prepared, label, number, kept=number not in self.left_out)
            except ImageFault as fault:
                rejected.append(self._rejected(sample.key, fault.reason, fault.detail))
            seen.add(sample.key)
        shard = None
        if tables.records:
            tar.seek(0)
            sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
            table = tables.finish(tar.size, sha256)
            write_table(destination / table_name(self.name), table)
            labelled = int((table.records["label"] != NO_LABEL).sum())
            shard = Shard(self.name, table.shard_bytes, sha256, len(table), labelled, str(self.tar))
        else:
            (destination / table_name(self.name)).unlink(missing_ok=True)
        job = self._whole_key()
        if self.images.examine == "pixels":
            tables.examined.write(destination, self.name, shard, job)
        return ShardSummary(
            self.name, self.split, self.num_files, shard, f"{content_sum(tables.digests):064x}", tables.totals,
            rejected, counts=tables.counted.counts(), job=job,
        )  # fmt: skip

    def _rejected(self, member: str, reason: str, detail: str) -> Rejected:
        return Rejected(f"{self._shown}/{member}", reason, detail)

    def _decode(self, content: bytes) -> PreparedImage:
        if not content:
            raise ImageFault("empty_file", "0 bytes")
        if image := prepare_by_header(content, self.images):
            return image
        decoded = decode_image(content, self.channels, self.images)
        wrong = [change for change in decoded.changes if not change.startswith(HARMLESS_CHANGES)]
        if wrong:
            raise ImageFault("needs_rewriting", f"{', '.join(wrong)}; --set tars=rewrite corrects it")
        width, height = image_size(decoded.pixels)
        moments = pixel_moments(decoded.pixels)
        return PreparedImage(
            content, "", width, height, (), *moments, decoded.format, decoded.mode, decoded.pixels, decoded.profile
        )  # fmt: skip


class _TableOfTar:
    """The samples that were taken so far."""

    def __init__(self, *, with_hashes: bool) -> None:
        self._with_hashes = with_hashes
        self.records: list[tuple[int, ...]] = []
        self.digests: list[int] = []
        self.totals, self.counted = ImageTotals(), CountedImages()
        self.examined = ExaminedImages()
        self._names = bytearray()

    def add(
        self, sample: TarSample, member: TarMember, image: PreparedImage, label: int, number: int, *, kept: bool
    ) -> None:
        sha256 = hashlib.sha256(image.content).digest()
        if self._with_hashes:
            self.examined.add(number, label, image, sha256, kept=kept)
        if not kept:
            return
        json = sample.members.get("json", TarMember("", 0, 0))
        self._names += os.fsencode(member.name)
        checksum = crc32(image.content)
        self.records.append((member.offset, json.offset, member.bytes, json.bytes, checksum, label, len(self._names)))
        self.digests.append(sample_digest(sha256, label))
        self.totals.add(image)
        self.counted.add(image)

    def finish(self, tar_bytes: int, tar_sha256: str) -> ShardTable:
        return ShardTable(np.array(self.records, dtype=RECORD), bytes(self._names), tar_bytes, tar_sha256)


@dataclass(frozen=True)
class _Places:
    """Where the samples of a tar lie, by their numbers: 24 bytes and a key each. `images` is (samples, 2) int64:
    offset and size, 0 bytes where a sample is not of one image."""

    keys: bytes
    ends: np.ndarray
    images: np.ndarray

    def key(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return os.fsdecode(self.keys[start : int(self.ends[number])])


@lru_cache(maxsize=4096)
def _places_in(tar: Location, stamp: int) -> _Places:
    """Kept, for whoever asks for copies asks here and there: a tar is read through once."""
    keys, ends, images = bytearray(), [], []
    with open_random(tar) as file:
        for sample in tar_samples(file, str(tar)):
            if isinstance(sample, TarMember):
                continue
            keys += os.fsencode(sample.key)
            ends.append(len(keys))
            image = None if sample.fault(seen=False) else sample.images()[0]
            images.append((0, 0) if image is None else (image.offset, image.bytes))
    return _Places(bytes(keys), np.array(ends, np.int64), np.array(images, np.int64).reshape(-1, 2))


@contextmanager
def _at_hand(tar: Location, destination: Path) -> Iterator[PathFile]:
    """The tar, open; one behind a URL is copied for as long as it is read, for every byte of it is wanted twice."""
    if isinstance(tar, Path):
        with PathFile(tar) as file:
            yield file
        return
    with tempfile.NamedTemporaryFile(dir=destination, prefix=TEMPORARY_PREFIX) as copy:
        for piece in stream(tar, size_of(tar)):
            copy.write(piece)
        copy.flush()
        with PathFile(Path(copy.name)) as file:
            yield file
