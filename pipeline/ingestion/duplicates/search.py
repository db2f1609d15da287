"""The search for copies in a dataset that is being made: hashes of its shards, near pairs, what they mean.

What was found of near copies is kept, so that the same images need not be decoded and compared again.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from pipeline.errors import DataError, InputError
from pipeline.ingestion.duplicates.copies import Copies, Read, equal_pixels, find_copies
from pipeline.ingestion.duplicates.findings import Findings, find_meaning, leaving
from pipeline.ingestion.duplicates.hash_file import (
    EXAMINED,
    FOLDER,
    VERSION,
    HashFile,
    hash_path,
    read_hashes,
)
from pipeline.ingestion.duplicates.likeness import MOST_BITS, likeness
from pipeline.ingestion.duplicates.sample_hashes import restore_hashes
from pipeline.ingestion.duplicates.samples import OTHERS, ComparedSamples, SamplesBuilder, add_others, num_others
from pipeline.ingestion.progress import Counted
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.shard_contract import ShardJob
from pipeline.shards.atomic import write_file
from pipeline.shards.index import SPLITS, DatasetIndex, read_index
from pipeline.shards.reader import ShardReader, node_reader
from pipeline.storage.location import location

NEAR_NAME = "near.npz"


class ExaminedDataset:
    """The images of a dataset, of whatever was left out of it, and of the datasets it is held against."""

    def __init__(
        self, index: DatasetIndex, jobs: Sequence[ShardJob], others: Sequence[DatasetIndex],
        restored: Counted | None = None,
    ):  # fmt: skip
        self.index, self.jobs, self.others = index, jobs, others
        self._numbers = {shard.name: number for shards in index.splits.values() for number, shard in enumerate(shards)}
        self._readers: dict[tuple[int, str], ShardReader] = {}
        self.samples = self._gather(restored)

    def read(self, position: int) -> bytes:
        """The image as it is, or would be, stored; DataError, ImageFault or OSError where it cannot be read."""
        if (place := self._at(position))[2] < 0:
            return self.jobs[int(self.samples.shard[position])].stored(int(self.samples.number[position]))
        reader, shard, row = place
        return reader.read(shard, row).image

    def key(self, position: int) -> str | None:
        """None of an image that was left out."""
        reader, shard, row = self._at(position)
        return None if row < 0 else reader.keys(shard)[row]

    def path(self, position: int) -> str:
        """Of an image of the dataset, in its source."""
        return self.jobs[int(self.samples.shard[position])].path(int(self.samples.number[position]))

    def record(self, position: int) -> dict[str, Any]:
        """The .json of its sample; empty where it has none, or was left out."""
        reader, shard, row = self._at(position)
        try:
            return {} if row < 0 else reader.record(shard, row)
        except DataError:
            return {}

    def place_name(self, position: int) -> str:
        place = int(self.samples.place[position])
        return SPLITS[place] if place < OTHERS else self.other_name(place)

    def other_name(self, place: int) -> str:
        return str(self.others[place - OTHERS].directory)

    @cached_property
    def basis(self) -> str:
        """The same for the same images in the same places."""
        digest = hashlib.sha256(repr((VERSION, MOST_BITS, len(self.samples))).encode())
        for column in (self.samples.pixels, self.samples.place, self.samples.perceptual):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def has_images_of(self, other: "ExaminedDataset") -> bool:
        """Whether a position of one is the same image of the same file in the other, left out or not."""
        ours, theirs = self.samples, other.samples
        return self.basis == other.basis and all(
            np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("shard", "number", "label")
        )

    def _at(self, position: int) -> tuple[ShardReader | None, int, int]:
        row, shard = int(self.samples.row[position]), int(self.samples.shard[position])
        if self.samples.place[position] >= OTHERS:
            dataset, split, number = self.samples.other_shards[shard]
            return self._reader(dataset, split), number, row
        if row < 0:
            return None, -1, -1
        job = self.jobs[shard]
        return self._reader(-1, job.split), self._numbers[job.name], row

    def _reader(self, dataset: int, split: str) -> ShardReader:
        if (dataset, split) not in self._readers:
            index = self.index if dataset < 0 else self.others[dataset]
            self._readers[dataset, split] = node_reader(index, split)
        return self._readers[dataset, split]

    def _gather(self, restored: Counted | None) -> ComparedSamples:
        folder = self.index.directory / FOLDER
        builder = SamplesBuilder(sum(job.num_files for job in self.jobs) + num_others(self.others))
        self._restore(restored)
        for number, job in enumerate(self.jobs):
            builder.add_job(SPLITS.index(job.split), number, self._hashes(job) or HashFile(b"", np.zeros(0, EXAMINED)))
        add_others(builder, self.others, folder)
        return builder.finished()

    def _restore(self, restored: Counted | None) -> None:
        """Hash files that are lost, or of an earlier version, from the shards themselves."""
        lost = [job for job in self.jobs if job.name in self._numbers and self._hashes(job) is None]
        places = [(job.split, self._numbers[job.name]) for job in lost]
        keys = (self._reader(-1, split).keys(number) for split, number in places)
        restore_hashes(self.index, [
            (*place, job.numbers_of(of_shard)) for place, job, of_shard in zip(places, lost, keys, strict=True)
        ], restored)  # fmt: skip

    def _hashes(self, job: ShardJob) -> HashFile | None:
        """As the job kept them."""
        number = self._numbers.get(job.name)
        shard = None if number is None else self.index.shards(job.split)[number]
        return read_hashes(hash_path(self.index.directory, job.name), shard)


@dataclass(frozen=True)
class CopySearch:
    """What was found in the whole source, and what of it is in the dataset. `removed` is (N,) bool."""

    dataset: ExaminedDataset
    copies: Copies
    whole: Findings
    findings: Findings
    removed: np.ndarray
    remove: bool

    def left_out(self) -> Mapping[int, Sequence[int]]:
        """By the number of a job: the files that it leaves out."""
        samples, by_job = self.dataset.samples, {}
        for position in np.flatnonzero(self.removed).tolist():
            by_job.setdefault(int(samples.shard[position]), []).append(int(samples.number[position]))
        return by_job

    def leaves_nothing(self) -> bool:
        return bool(self.removed[self.dataset.samples.place < OTHERS].all())

    def rejected(self) -> list[Rejected]:
        return [
            Rejected(self.dataset.path(position), "duplicate", self.in_words(position))
            for position in np.flatnonzero(self.removed).tolist()
        ]

    def in_words(self, position: int) -> str:
        """Of which image one is a copy."""
        partner, apart = int(self.whole.partner[position]), float(self.whole.distance[position])
        how = f"a near copy, {apart:.1f} grey levels apart," if apart else "has the pixels"
        if self.dataset.samples.place[partner] < OTHERS:
            return f"{how} of {self.dataset.place_name(partner)}: {self.dataset.path(partner)}"
        return f"{how} of {self.dataset.place_name(partner)}: key {self.dataset.key(partner)}"


def read_others(directories: Sequence[Path], destination: Path) -> list[DatasetIndex]:
    """The datasets of `leakage_against`; InputError where one is none, or is the one that is being made."""
    others = []
    for directory in directories:
        if directory.resolve() == destination.resolve():
            raise InputError(f"leakage_against: {directory}: is the dataset itself, whose splits are compared anyway")
        try:
            others.append(read_index(location(directory), check_sizes=True))
        except InputError as error:
            raise InputError(*(f"leakage_against: {problem}" for problem in error.problems)) from None
    return others


def search_copies(dataset: ExaminedDataset, *, remove: bool) -> CopySearch:
    """All copies among the images of `dataset`, also those that it was left without."""
    samples = dataset.samples
    copies = _known_or_found(dataset, lambda position: likeness(dataset.read(position)))
    whole = find_meaning(samples, copies, np.ones(len(samples), bool))
    removed = leaving(samples, copies, whole) if remove else np.zeros(len(samples), bool)
    return CopySearch(dataset, copies, whole, find_meaning(samples, copies, ~removed), removed, remove)


def _known_or_found(dataset: ExaminedDataset, read: Read) -> Copies:
    path = dataset.index.directory / FOLDER / NEAR_NAME
    names = [column.name for column in fields(Copies) if column.name != "group"]
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["basis"]) == dataset.basis:
                known = {name: kept[name] if kept[name].ndim else kept[name].item() for name in names}
                return Copies(equal_pixels(dataset.samples.pixels), **known)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # none, or damaged
        pass
    copies = find_copies(dataset.samples, read)
    buffer = io.BytesIO()
    np.savez(buffer, basis=np.array(dataset.basis), **{name: getattr(copies, name) for name in names})
    path.parent.mkdir(exist_ok=True)
    write_file(path, buffer.getvalue())
    return copies
