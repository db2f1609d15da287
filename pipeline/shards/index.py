"""`index.json`, the first file of a dataset to be read and the last to be written: no index, no dataset.

It stays small at 100,000 shards because the table of samples lies beside each shard (see table.py). An adopted tar is
not copied: its shard has a `location`, and only its table lies in the dataset's directory. The directory may be a URL;
then it is only read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.atomic import write_file
from pipeline.shards.label_sets import LabelSets, classes_of_labels, label_matrix, read_label_sets, write_label_sets
from pipeline.shards.tombstones import Tombstone, read_tombstones, tombstones_sha256
from pipeline.storage.location import Location, Url, exists, joined, location, read_bytes, size_of, sizes_in

FORMAT_VERSION = 2  # 2: with label sets; a dataset without any is still written as 1
READABLE_VERSIONS = (1, 2)
INDEX_NAME = "index.json"
SPLITS = ("train", "validation", "test")
MAX_PROBLEMS = 8  # lines a person reads; the rest is a count


@dataclass(frozen=True)
class Shard:
    """One tar of the dataset. `labelled` counts the samples that have a label."""

    name: str
    bytes: int
    sha256: str
    samples: int
    labelled: int
    location: str | None = None  # path or URL of an adopted tar; None: in the dataset's directory, under `name`


@dataclass(frozen=True)
class ImageStatistics:
    """Every image of the train split weighs the same, whatever its size. Pixel values 0..1.

    `mean` and `std` hold one value per channel, and are None where images differ in their number of channels.
    `width` and `height` are (least, mean, greatest) in pixels.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    mean_encoded_bytes: float
    width: tuple[float, float, float]
    height: tuple[float, float, float]


@dataclass(frozen=True)
class DatasetIndex:
    """What `index.json` says, the directory it was read from, and what its `tombstones.jsonl` leaves out.

    Numbers of samples count those that are left out too.
    """

    directory: Location
    fingerprint: str
    splits: dict[str, tuple[Shard, ...]]
    classes: tuple[str, ...] | None
    statistics: ImageStatistics | None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    tombstones: tuple[Tombstone, ...] = ()
    label_sets: LabelSets | None = None  # by label: the classes it stands for; None: a label is a class
    mask_classes: tuple[str, ...] | None = None  # None: samples have no masks
    box_classes: tuple[str, ...] | None = None  # None: samples have no boxes

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.shards(split))

    @property
    def remaining_fingerprint(self) -> str:
        """The identity of what is scored: the fingerprint, or where samples were taken down, a hash of it and the list.

        Scores from before and after do not pair sample by sample.
        """
        if not self.tombstones:
            return self.fingerprint
        return hashlib.sha256(f"{self.fingerprint} {tombstones_sha256(self.tombstones)}".encode()).hexdigest()

    @property
    def examined(self) -> bool:
        """Whether every image was decoded when it was ingested; no with `examine: header`."""
        return self.provenance.get("made_from", {}).get("examine", "pixels") == "pixels"

    @property
    def num_classes(self) -> int:
        return len(self.classes or ())

    def num_unlabelled(self, split: str) -> int:
        return sum(shard.samples - shard.labelled for shard in self.shards(split))

    @property
    def num_labels(self) -> int:
        """A sample's label is below it."""
        return self.num_classes if self.label_sets is None else len(self.label_sets)

    def label_matrix(self) -> np.ndarray:
        """(labels, classes) bool: the classes that each label stands for."""
        return label_matrix(self.label_sets, self.num_classes)

    def classes_of_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """The same as pairs: (entries,) labels, ascending, and the class of each."""
        return classes_of_labels(self.label_sets, self.num_classes)

    @property
    def labelled(self) -> bool:
        """Every sample of every split has a label."""
        return all(shard.labelled == shard.samples for shards in self.splits.values() for shard in shards)

    def shards(self, split: str) -> tuple[Shard, ...]:
        if split not in self.splits:
            raise InputError(f"{self.directory}: no split `{split}`; there are: {', '.join(self.splits)}")
        return self.splits[split]

    def shard_path(self, shard: Shard) -> Location:
        return joined(self.directory, shard.location or shard.name)

    def table_path(self, shard: Shard) -> Location:
        return self.directory / table_name(shard.name)


def table_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".idx"


def write_index(index: DatasetIndex) -> None:
    """Publish the dataset: from here on it can be read. The same index gives the same bytes."""
    content = {
        "format_version": 1 if index.label_sets is None else FORMAT_VERSION,
        "fingerprint": index.fingerprint,
        "splits": {split: [_shard_content(shard) for shard in shards] for split, shards in index.splits.items()},
        "classes": None if index.classes is None else list(index.classes),
        "statistics": None if index.statistics is None else asdict(index.statistics),
        "provenance": dict(index.provenance),
    }
    if index.label_sets is not None:
        content["label_sets"] = write_label_sets(index.directory, index.label_sets)
    annotated = {"mask_classes": index.mask_classes, "box_classes": index.box_classes}
    content |= {key: list(names) for key, names in annotated.items() if names is not None}
    content["checksum"] = _checksum(content)
    write_file(index.directory / INDEX_NAME, json.dumps(content, indent=1).encode() + b"\n")


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of an index's content but for its checksum, however it is laid out."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def was_edited(directory: Location) -> bool:
    """Whether `index.json`, which can be read, was changed since it was written.

    One of before there were checksums cannot tell: False. One that names a certificate was written with a checksum.
    """
    content = json.loads(read_bytes(directory / INDEX_NAME))
    if "checksum" not in content:
        return "certificate" in content["provenance"]
    return content["checksum"] != _checksum(content)


def _shard_content(shard: Shard) -> dict[str, Any]:
    return {key: value for key, value in asdict(shard).items() if value is not None}


def read_index(directory: str | Path | Url, *, check_sizes: bool = False) -> DatasetIndex:
    """The index of the dataset in `directory`, a path or a URL; InputError when there is none that this version reads.

    With `check_sizes` every shard must be there with its indexed size: one stat per shard, or one listing of a URL;
    nothing is read. FaultError where a URL does not answer.
    """
    directory = location(directory)
    path = directory / INDEX_NAME
    try:
        content = json.loads(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError):
        hint = "ingest it with `vit ingest SOURCE DEST`"
        raise InputError(
            f"{directory}: no such dataset; {hint}"
            if not exists(directory)
            else f"{path}: missing, so this is not a finished dataset; {hint}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); ingest the dataset again") from None
    index = _parse_index(directory, path, content)
    if check_sizes and (problems := size_problems(index)):
        raise InputError(*shortened(problems))
    return index


def _parse_index(directory: Location, path: Location, content: Any) -> DatasetIndex:
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest this program reads; update it"
        )
    try:
        if version not in READABLE_VERSIONS:
            raise TypeError(f"format_version {version!r}")
        statistics = content["statistics"]
        classes = None if content["classes"] is None else tuple(content["classes"])
        said = content.get("label_sets")
        return DatasetIndex(
            directory=directory,
            fingerprint=content["fingerprint"],
            splits={
                split: tuple(_parse_shard(shard) for shard in shards) for split, shards in content["splits"].items()
            },
            classes=classes,
            statistics=None if statistics is None else ImageStatistics(**_tuples(statistics)),
            provenance=content["provenance"],
            tombstones=read_tombstones(directory),
            label_sets=None if said is None else read_label_sets(directory, said, len(classes)),
            **{key: tuple(content[key]) for key in ("mask_classes", "box_classes") if key in content},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a dataset index ({error!r}); ingest the dataset again") from None


def _parse_shard(content: Mapping[str, Any]) -> Shard:
    shard = Shard(**content)
    numbers, words = (shard.bytes, shard.samples, shard.labelled), (shard.name, shard.sha256)
    if not all(type(number) is int for number in numbers) or not all(isinstance(word, str) for word in words):
        raise TypeError(f"shard {shard.name!r}: bytes, samples and labelled are numbers, name and sha256 are text")
    return shard


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def size_problems(index: DatasetIndex) -> list[str]:
    """One line per shard that is missing, has no table, or has another size than the index says."""
    listed = sizes_in(index.directory) if isinstance(index.directory, Url) else {}
    problems = []
    for shard in (shard for shards in index.splits.values() for shard in shards):
        path = index.shard_path(shard)
        try:
            size = listed.get(shard.name) if shard.location is None else None
            size = size_of(path) if size is None else size
            if table_name(shard.name) not in listed:
                size_of(index.table_path(shard))
        except OSError as error:
            missing = error.filename or path
            problems.append(
                f"{missing}: cannot be found ({error.strerror or 'no such file'}); restore it or ingest again"
            )
            continue
        if size != shard.bytes:
            what = "cut" if size < shard.bytes else "changed"
            sizes = f"{size} bytes, the index says {shard.bytes}"
            problems.append(f"{path}: {what}: {sizes}; restore it or ingest again")
    return problems


def shortened(problems: list[str]) -> list[str]:
    """The first problems, and how many more there are."""
    more = len(problems) - MAX_PROBLEMS
    return problems if more <= 0 else [*problems[:MAX_PROBLEMS], f"... and {more} more like these"]
