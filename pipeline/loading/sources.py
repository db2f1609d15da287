"""The datasets of a run seen as one: names, classes and statistics of a mixture. Torch-free."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config.data import DataConfig
from pipeline.errors import InputError
from pipeline.shards.index import DatasetIndex, Shard, read_index
from pipeline.shards.label_sets import LabelSets
from pipeline.shards.tombstones import tombstones_sha256


@dataclass(frozen=True)
class Sources:
    """Datasets that are mixed by `weights`, or a single one. Without weights every sample is as likely as any other."""

    indexes: tuple[DatasetIndex, ...]
    weights: tuple[float, ...] | None = None

    def weighted(self, split: str) -> "Sources":
        """The same with weights: those given, or the number of samples in `split`."""
        if self.weights is not None:
            return self
        sizes = tuple(float(index.num_samples(split)) for index in self.indexes)
        return Sources(self.indexes, sizes if len(sizes) > 1 else (1.0,))

    @property
    def name(self) -> str:
        return "+".join(index.directory.name for index in self.indexes)

    @property
    def path(self) -> str:
        return ", ".join(str(index.directory) for index in self.indexes)

    @property
    def fingerprint(self) -> str:
        """The dataset's own; of a mixture, the SHA-256 of its datasets' fingerprints and weights."""
        if len(self.indexes) == 1:
            return self.indexes[0].fingerprint
        parts = [[index.fingerprint, weight] for index, weight in zip(self.indexes, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def shards_sha256(self) -> str:
        """Of the shards in their order. Equal content in other shards has the same fingerprint, and another order."""
        shards = [[[s.sha256, s.samples] for s in shards] for index in self.indexes for shards in index.splits.values()]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    @property
    def tombstones(self) -> list[dict]:
        """Per dataset, how many samples its tombstone list leaves out, and the list's hash; see `tombstones_sha256`."""
        stones = [index.tombstones for index in self.indexes]
        return [{"count": len(of_one), "sha256": tombstones_sha256(of_one)} for of_one in stones]

    @property
    def classes(self) -> tuple[str, ...] | None:
        return union_of_classes(self.indexes)

    @property
    def label_sets(self) -> LabelSets | None:
        """By label, the classes it stands for; None where each label is a class. InputError for a mixture of such."""
        of_sets = [index for index in self.indexes if index.label_sets is not None]
        if of_sets and len(self.indexes) > 1:
            raise InputError(
                f"--data {of_sets[0].directory}: its images have several classes each, and such a dataset is not "
                "mixed with others to learn labels from; train on it alone"
            )
        return of_sets[0].label_sets if of_sets else None

    def require_split(self, split: str, where: str) -> None:
        for index in self.indexes:
            if split not in index.splits:
                has = ", ".join(index.splits)
                raise InputError(f"{where}: data.split: {index.directory} has no split `{split}`, only {has}")

    def shards(self, split: str) -> list[tuple[Shard, ...]]:
        return [index.shards(split) for index in self.indexes]

    def num_samples(self, split: str) -> int:
        return sum(index.num_samples(split) for index in self.indexes)

    def pixel_statistics(self, what: str) -> tuple[float, ...] | None:
        """`mean` or `std` per channel, averaged by weight; None where a dataset has none, or another channel count.

        The deviation of a mixture leaves out how far the datasets' means lie apart.
        """
        found = [index.statistics and getattr(index.statistics, what) for index in self.indexes]
        if any(values is None for values in found) or len({len(values) for values in found}) != 1:
            return None
        if len(found) == 1:
            return found[0]
        power = 2 if what == "std" else 1
        pooled = np.average(np.array(found) ** power, axis=0, weights=self.weights) ** (1 / power)
        return tuple(pooled.tolist())

    @property
    def examined(self) -> bool:
        """Whether the pixels of every dataset were looked at when it was ingested."""
        return all(index.examined for index in self.indexes)

    def as_plan(self) -> dict:
        """What plan.json says of the data."""
        plan = {
            "path": self.path,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "shards_sha256": self.shards_sha256,
            "classes": list(self.classes) if self.classes else None,
        }
        if any(index.tombstones for index in self.indexes):
            plan["tombstones"] = self.tombstones
        if any(index.label_sets is not None for index in self.indexes):
            plan["has_label_sets"] = True
        if len(self.indexes) > 1:
            plan["sources"] = [
                {"path": str(index.directory), "fingerprint": index.fingerprint, "weight": weight}
                for index, weight in zip(self.indexes, self.weights, strict=True)
            ]
        return plan


def open_sources(data: DataConfig) -> Sources:
    """The datasets that a run's config names."""
    indexes = tuple(read_index(source.path) for source in data.sources)
    return Sources(indexes, tuple(source.weight for source in data.sources))


def union_of_classes(indexes: Sequence[DatasetIndex]) -> tuple[str, ...] | None:
    """Class names in the order in which the datasets first name them; equal names are one class."""
    names = dict.fromkeys(name for index in indexes for name in index.classes or ())
    return tuple(names) or None


def label_map(index: DatasetIndex, classes: Sequence[str] | None) -> np.ndarray:
    """(labels of the dataset + 1,) int64: its labels among `classes`; the last entry keeps -1, no label, as it is.

    Label sets keep their numbers: they are of the only dataset, or nobody learns from labels.
    """
    if index.label_sets is not None:
        return np.array([*range(index.num_labels), -1], dtype=np.int64)
    places = {name: place for place, name in enumerate(classes or ())}
    return np.array([*(places[name] for name in index.classes or ()), -1], dtype=np.int64)
