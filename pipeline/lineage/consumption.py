"""When a run read a sample: the order turned round. Only what lies behind a checkpoint counts.

A position that was passed over, in a roll-back or by `data.skipped`, was not read by the steps that the checkpoint
stands on. A sample on a tombstone list is not read from the step on at which the list held, and the next of its shard,
which stands in for it, is read once more. A damaged sample that another stood in for cannot be told from one that was
read: how many there were is said with the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.recipe import validate
from pipeline.config.training import FinetuneConfig, PretrainConfig, TrainingConfig
from pipeline.errors import InputError
from pipeline.loading.left_out import LeftOut
from pipeline.loading.mixture import planned_mixture
from pipeline.loading.selection import Selection
from pipeline.shards.index import DatasetIndex
from pipeline.shards.order import count_before, pass_over
from pipeline.shards.reader import node_readers
from pipeline.shards.tombstones import tombstones_sha256


class Seen(NamedTuple):
    """Epochs and steps of one sample, in the order of steps. Epochs count from 0, steps from 1 as in the log."""

    epochs: list[int]
    steps: list[int]

    def in_words(self) -> str:
        times = "once" if len(self.steps) == 1 else f"{len(self.steps)} times"
        return f"seen {times}: epochs {ranges_in_words(sorted(set(self.epochs)))}, steps {listed(self.steps)}"


class Consumption:
    """What the first `step` steps of a run read of its datasets. `reading` is a node's, see `lineage.trail`."""

    def __init__(self, reading: Mapping[str, Any], indexes: Sequence[DatasetIndex]):
        """InputError where the config is not one of this program's, or the tombstone lists are not those that held."""
        self.config = training_config(reading["config"])
        self.step, self.skipped = reading["step"], [tuple(one) for one in reading["skipped"]]
        self.indexes = indexes
        data = self.config.data
        self.readers, _ = node_readers(indexes, data.split)
        self.selections = [Selection.of(reader, data.label_fraction, data.max_samples) for reader in self.readers]
        self.mixture = planned_mixture(self.config, [selection.shard_sizes for selection in self.selections])
        self.batch = self.config.global_batch_size
        self.end = int(pass_over(np.array([self.step * self.batch - 1]), self.skipped)[0]) + 1 if self.step else 0
        self.lists = [(0, [_nothing_left_out(selection) for selection in self.selections])]
        self.lists += [(entry["step"], self._left_out(entry["sources"])) for entry in reading["tombstones"]]

    def seen(self, source: int, shard: int, sample: int) -> Seen:
        """Where a sample of a dataset's training split was read; empty where it never was."""
        place = self.selections[source].place(shard, sample)
        if place is None:
            return Seen([], [])
        found: list[tuple[int, int]] = []  # (step, position)
        for (begins, left_out), ends in zip(self.lists, [*(b for b, _ in self.lists[1:]), self.step], strict=True):
            if (shard, place) in left_out[source].places:
                continue
            instead_of = [other for other in sorted(left_out[source].places)
                          if left_out[source].present(*other) == (shard, place)]  # fmt: skip
            for at in [(shard, place), *instead_of]:
                found += [(step, position) for step, position in self._read(source, *at) if begins <= step < ends]
        found.sort()
        epochs = self.mixture.locate(np.array([position for _, position in found], np.int64)).epochs
        return Seen(epochs.tolist(), [step + 1 for step, _ in found])

    def _read(self, source: int, shard: int, place: int) -> list[tuple[int, int]]:
        """(step from 0, position) of a place, whatever the tombstone lists."""
        positions = self.mixture.positions_of(source, shard, place, self.end).tolist()
        counted = [(count_before(position, self.skipped), position) for position in positions]
        return [(count // self.batch, position) for count, position in counted if count is not None]

    def takes_part(self, source: int, shard: int, sample: int) -> bool:
        """Whether a sample of the split is among those that `data.label_fraction` chose."""
        return self.selections[source].place(shard, sample) is not None

    def _left_out(self, held: Sequence[Mapping[str, Any]]) -> list[LeftOut]:
        """What the lists left out when they had so many lines."""
        found = []
        for index, reader, selection, one in zip(self.indexes, self.readers, self.selections, held, strict=True):
            stones = index.tombstones[: one["count"]]
            if tombstones_sha256(stones) != one["sha256"]:
                raise InputError(
                    f"{index.directory}: its tombstone list is not the one that the run read by, whose first "
                    f"{one['count']} lines had sha256 {one['sha256']}"
                )
            chosen = [place for stone in stones if stone.split == self.config.data.split
                      for place in reader.places_of_tombstone(stone)]  # fmt: skip
            found.append(LeftOut(selection, frozenset(chosen), index.directory))
        return found


def _nothing_left_out(selection: Selection) -> LeftOut:
    return LeftOut(selection, frozenset())


def training_config(raw: Mapping[str, Any]) -> TrainingConfig:
    return validate(FinetuneConfig if raw.get("stage") == "finetune" else PretrainConfig, raw, "the run's config")


def ranges_in_words(numbers: Sequence[int]) -> str:
    """`0-11`, `0, 2-4, 9`: ascending numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def listed(numbers: Sequence[int], most: int = 12) -> str:
    more = f", ... and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more
