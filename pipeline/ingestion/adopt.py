"""Adopts one existing tar in place: reads it once, writes only its table.

The tar is not rewritten, so an image that a plain decoder would show wrong (rotated, transparent, 16 bit) is rejected
rather than corrected; the table leaves it out.
"""

import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
from pipeline.ingestion.shard_jobs import JOB_VERSION, ShardSummary
from pipeline.ingestion.statistics import ImageTotals
from pipeline.ingestion.tars import LabelRule, TarMember, TarSample, read_samples
from pipeline.shards.decoding import ImageFault
from pipeline.shards.fingerprint import content_sum, sample_digest
from pipeline.shards.index import Shard, table_name
from pipeline.shards.table import NO_LABEL, RECORD, ShardTable, write_table

HARMLESS_CHANGES = ("first frame", "from")  # a decoder shows the first frame of any of the formats


@dataclass(frozen=True)
class AdoptTar:
    """The shard job of one tar. `name` is what its shard is called in the dataset; `tar` is where it stays."""

    name: str
    split: str
    tar: Path
    num_files: int
    rule: LabelRule
    channels: str
    images: ImageRule = ImageRule()

    @property
    def num_bytes(self) -> int:
        return self.tar.stat().st_size

    def key(self) -> str:
        status = self.tar.stat()
        content = (JOB_VERSION, str(self.tar), status.st_size, status.st_mtime_ns, self.channels, self.rule)
        content += () if self.images == ImageRule() else (self.images,)
        return hashlib.sha256(repr(content).encode(errors="surrogateescape")).hexdigest()

    def run(self, destination: Path) -> ShardSummary:
        samples, others = read_samples(self.tar)
        tables = _TableOfTar()
        rejected = [self._rejected(member.name, "not_an_image", "belongs to no sample") for member in others]
        with open(self.tar, "rb") as tar:
            sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
            seen: set[str] = set()
            for number, sample in enumerate(samples):
                try:
                    with held(number) as start_clock:
                        image = _only_image(sample, seen)
                        content = image.read(tar)
                        start_clock()
                        tables.add(sample, image, self._decode(content), self.rule.label(sample, tar))
                except ImageFault as fault:
                    rejected.append(self._rejected(sample.key, fault.reason, fault.detail))
                seen.add(sample.key)
        shard = None
        if tables.records:
            table = tables.finish(self.tar.stat().st_size, sha256)
            write_table(destination / table_name(self.name), table)
            labelled = int((table.records["label"] != NO_LABEL).sum())
            shard = Shard(self.name, table.shard_bytes, sha256, len(table), labelled, str(self.tar))
        content = f"{content_sum(tables.digests):064x}"
        return ShardSummary(self.name, self.split, self.num_files, shard, content, tables.totals, rejected)

    def _rejected(self, member: str, reason: str, detail: str) -> Rejected:
        return Rejected(f"{self.tar.name}/{member}", reason, detail)

    def _decode(self, content: bytes) -> PreparedImage:
        if not content:
            raise ImageFault("empty_file", "0 bytes")
        if image := prepare_by_header(content, self.images):
            return image
        decoded = decode_image(content, self.channels, self.images)
        wrong = [change for change in decoded.changes if not change.startswith(HARMLESS_CHANGES)]
        if wrong:
            raise ImageFault("needs_rewriting", f"{', '.join(wrong)}; unpack the tar and ingest the folder to keep it")
        width, height = image_size(decoded.pixels)
        moments = pixel_moments(decoded.pixels)
        return PreparedImage(
            content, "", width, height, (), *moments, decoded.format, decoded.mode, decoded.pixels, decoded.profile
        )  # fmt: skip


class _TableOfTar:
    """The samples that were taken so far."""

    def __init__(self) -> None:
        self.records: list[tuple[int, ...]] = []
        self.digests: list[int] = []
        self.totals = ImageTotals()
        self._names = bytearray()

    def add(self, sample: TarSample, member: TarMember, image: PreparedImage, label: int) -> None:
        json = sample.members.get("json", TarMember("", 0, 0))
        self._names += os.fsencode(member.name)
        checksum = zlib.crc32(image.content)
        self.records.append((member.offset, json.offset, member.bytes, json.bytes, checksum, label, len(self._names)))
        self.digests.append(sample_digest(hashlib.sha256(image.content).digest(), label))
        self.totals.add(image)

    def finish(self, tar_bytes: int, tar_sha256: str) -> ShardTable:
        return ShardTable(np.array(self.records, dtype=RECORD), bytes(self._names), tar_bytes, tar_sha256)


def _only_image(sample: TarSample, seen: set[str]) -> TarMember:
    if sample.key in seen:
        raise ImageFault("split_sample", "its key was there before, with other samples between")
    images = sample.images()
    if not images:
        raise ImageFault("no_image", f"holds only {', '.join(sample.members)}; a cut may have left its image elsewhere")
    if len(images) > 1:
        names = ", ".join(image.name for image in images[:3])
        raise ImageFault("several_images", f"{names}: a key ends at the first dot of the file's name")
    return images[0]
