"""The samples of WebDataset tars as files of a source, to be written anew: shuffled, upright, in shards of one size.

An image takes its label along, from `.cls`, `.json` or `.txt` as in tars.py, and nothing else: captions and other
members stay where they are.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.errors import InputError
from pipeline.ingestion.archives.entries import PLAIN, ROW, path_hash, safe_path
from pipeline.ingestion.archives.members import TarFault
from pipeline.ingestion.archives.source import Archive, ArchiveSource
from pipeline.ingestion.archives.tars import (
    PARTNERS,
    LabelRule,
    TarFile,
    TarMember,
    TarSample,
    split_of_tar,
    tar_samples,
)
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import Listing, SourceFile
from pipeline.shards.table import NO_LABEL
from pipeline.storage.location import location
from pipeline.storage.random_access import open_random


@dataclass(frozen=True, eq=False)
class SampleSource(ArchiveSource):
    """The image of every sample in tars, labelled by `rule`."""

    rule: LabelRule = LabelRule(None)

    @cached_property
    def _listed(self) -> tuple[Listing, np.ndarray]:
        listing = Listing(labels={}, classes=self.rule.classes, folders_are_classes=False)
        rows: list[tuple[int, ...]] = []
        splits = [split_of_tar(location(archive.name)) for archive in self.archives]
        for number, (archive, split) in enumerate(zip(self.archives, splits, strict=True)):
            before = len(listing.images)
            self._list_tar(archive, number, listing, rows)
            if any(splits):  # tars that say none are train's, as where they are adopted
                listing.splits.update((file.path, split or "train") for file in listing.images[before:])
        table = np.array(rows, dtype=ROW)
        return listing, table[np.argsort(table["path"], kind="stable")]

    def _list_tar(self, archive: Archive, number: int, listing: Listing, rows: list[tuple[int, ...]]) -> None:
        seen: set[int] = set()
        try:
            with open_random(archive.where) as file:
                for sample in tar_samples(file, archive.name):
                    if isinstance(sample, TarMember):
                        why = "belongs to no sample"
                        listing.rejected.append(Rejected(archive.path(sample.name), "not_an_image", why))
                    else:
                        self._list_sample(archive, number, sample, file, seen, listing, rows)
        except TarFault as fault:
            raise InputError(str(fault)) from None

    def _list_sample(
        self, archive: Archive, number: int, sample: TarSample, file: TarFile, seen: set[int], listing: Listing,
        rows: list[tuple[int, ...]],
    ) -> None:  # fmt: skip
        images = sample.images()
        path, key = safe_path(images[0].name) if images else None, path_hash(sample.key)
        fault = sample.fault(key in seen)
        if fault is None and path is None:
            fault = "unsafe_name", "its name is no path within the archive"
        seen.add(key)
        if fault is not None:
            listing.rejected.append(Rejected(archive.path(sample.key), *fault))
            return
        image, path = images[0], archive.path(path)
        listing.images.append(SourceFile(path, image.bytes, archive.stamp))
        rows.append((path_hash(path), number, image.offset, image.bytes, image.bytes, 0, PLAIN, 0))
        if (label := self.rule.label(sample, file)) != NO_LABEL:
            listing.labels[path] = label
        for extension, member in sample.members.items():
            if member is not image and extension not in PARTNERS:
                why = f"lies beside `{image.name}`, and only a sample's image and label are taken"
                listing.rejected.append(Rejected(archive.path(member.name), "not_an_image", why))
