"""Taking a sample down: onto its dataset's tombstone list, and which models have learned from it."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError, FaultError, InputError, near_matches
from pipeline.lineage.consumption import Consumption, Seen
from pipeline.lineage.containment import opened
from pipeline.lineage.datasets import Datasets
from pipeline.lineage.trail import Node, Trail, ancestors
from pipeline.loading.sources import Sources
from pipeline.registry.locate import ModelSource, locate_model
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import ShardReader, node_reader
from pipeline.shards.tombstones import TOMBSTONES_NAME, Tombstone, add_tombstone, today

MOST_SEARCHED = 200_000  # keys among which near ones are looked for


class Place(NamedTuple):
    """Where a key lies in its dataset."""

    split: str
    shard: int
    sample: int


def places_of(index: DatasetIndex, key: str) -> list[Place]:
    """Every sample of this key; InputError with the near ones where there is none."""
    readers = {split: ShardReader(index, split) for split in index.splits}
    found = [
        Place(split, *place)
        for split, reader in readers.items()
        for place in reader.places_of_key(key)
    ]  # fmt: skip
    if not found:
        few = sum(map(index.num_samples, index.splits)) <= MOST_SEARCHED
        known = [k for r in readers.values() for shard in range(len(r.shard_sizes)) for k in r.keys(shard) if few]
        near = [hint for hint in [near_matches(key, known)] if hint.startswith("did you mean")]
        hint = near[0] if near else "vit explain MODEL --contains IMAGE finds keys"
        raise InputError(f"key `{key}`: not in {index.directory}; {hint}")
    return found


def take_down(index: DatasetIndex, places: list[Place], reason: str) -> int:
    """Put samples on the list of their dataset; how many were not on it. InputError where it cannot be written."""
    if not isinstance(index.directory, Path):
        raise InputError(
            f"{index.directory}: only a directory of this machine is written to; take it down where the dataset was "
            f"made and upload its {TOMBSTONES_NAME}"
        )
    added = 0
    for place in places:
        reader, shard = node_reader(index, place.split), index.shards(place.split)[place.shard]
        try:
            sha256 = hashlib.sha256(reader.read(place.shard, place.sample, verify=False).image).hexdigest()
        except DataError:  # damaged: it can be taken down all the same
            sha256 = ""
        key = reader.keys(place.shard)[place.sample]
        try:
            added += add_tombstone(index.directory, Tombstone(key, place.split, shard.name, sha256, today(), reason))
        except OSError as error:
            raise InputError(f"{index.directory / TOMBSTONES_NAME}: cannot be written ({error.strerror})") from None
    return added


def places_in(copy: DatasetIndex, index: DatasetIndex, places: list[Place]) -> list[Place]:
    """Where samples of `index` lie in a copy of it, which may have the same images in other shards: by their keys."""
    if Sources((copy,)).shards_sha256 == Sources((index,)).shards_sha256:
        return places
    keys = [(place.split, ShardReader(index, place.split).keys(place.shard)[place.sample]) for place in places]
    return [Place(split, *found) for split, key in dict.fromkeys(keys)
            for found in ShardReader(copy, split).places_of_key(key)]  # fmt: skip


def _seen(read: Consumption, number: int, place: Place) -> Seen | None:
    if place.split != read.config.data.split:
        return None
    return read.seen(number, place.shard, place.sample)


class Descendants:
    """The runs and registered versions of a home that learned from samples of a dataset, or from a model that did."""

    def __init__(self, home: Path, tracking_uri: str):
        self.home, self.tracking_uri = home, tracking_uri
        self.trail, self.datasets = Trail(home), Datasets(home)
        self._opened: dict[tuple, Consumption] = {}

    def of(self, index: DatasetIndex, places: list[Place]) -> list[dict[str, Any]]:
        """{model, answer: yes|unknown, words} of each that did, or may have, which it says; runs, then versions."""
        found = []
        for name, node in [*self._runs(), *self._versions()]:
            words, certain = [], False
            for one in ancestors(node):
                said, sure = self._read_by(one, index, places)
                through = "" if one is node else f" through its {one['role']} {one['registered'] or one['model']}"
                words += [line + through for line in said]
                certain |= sure
            if words:
                found.append({"model": name, "answer": "yes" if certain else "unknown", "words": "; ".join(words)})
        return found

    def _read_by(self, node: Node, index: DatasetIndex, places: list[Place]) -> tuple[list[str], bool]:
        """In words what a run itself read of the samples, and whether that is certain."""
        words, certain = [], False
        for number, data in enumerate(node["data"]):
            if data["fingerprint"] != index.fingerprint:
                if data["path"] == str(index.directory):
                    words.append("cannot be told: it was trained on what this dataset was before it was ingested again")
                continue
            try:
                read = self._read_from(node)
                there = places_in(read.indexes[number], index, places)
                seen = [seen for place in there if (seen := _seen(read, number, place)) and seen.steps]
            except (InputError, DataError, FaultError) as error:
                words.append(f"cannot be told: {str(error).splitlines()[0]}")
                continue
            certain |= bool(seen)
            words += [one.in_words() for one in seen]
        return words, certain

    def _read_from(self, node: Node) -> Consumption:
        """What a node's run read; InputError where it cannot be told."""
        if node["reading"] is None:
            raise InputError("; ".join(node["notes"]) or "what it read is not recorded")
        key = (node["run"]["path"] if node["run"] else node["model"], node["weights"]["step"])
        if key not in self._opened:
            self._opened[key] = opened(node, self.datasets)
        return self._opened[key]

    def _runs(self) -> Iterator[tuple[str, Node]]:
        """Trainings that have a checkpoint, those of sweeps too."""
        configs = [path for depth in ("*", "*/*") for path in sorted((self.home / "runs").glob(f"{depth}/config.yaml"))]
        for run in dict.fromkeys(path.parent.resolve() for path in configs):
            try:
                source = locate_model(str(run), tracking_uri=self.tracking_uri, home=self.home)
            except (InputError, ValueError):  # no training, or nothing saved yet
                continue
            yield str(run), self.trail.of(source)

    def _versions(self) -> Iterator[tuple[str, Node]]:
        from pipeline.lineage.versions import registered_versions

        for version in registered_versions(self.tracking_uri):
            try:
                yield version.uri, self.trail.of(self._source(version))
            except InputError:
                continue  # its artifacts are gone

    def _source(self, version: Any) -> ModelSource:
        """From its tags alone where the run is here; else its artifacts are asked, which must be fetched."""
        lineage = {key.removeprefix("vit."): value for key, value in version.tags.items()}
        if lineage.get("run") and (Path(lineage["run"]) / "config.yaml").is_file():
            source = ModelSource(version.uri, "checkpoint", lineage["run"], lineage=lineage)
            return replace(source, lineage=lineage | {"registered": version.uri})
        return locate_model(version.uri, tracking_uri=self.tracking_uri, home=self.home)
