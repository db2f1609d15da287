"""`label-sets.json`: which classes each label of a dataset stands for, where images have several or none.

The label of a sample is then the number of a set of classes, so that tables, order and loader know one integer per
sample as ever. The sets of a large dataset are many, so they have a file of their own, whose SHA-256 is in the index.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.errors import InputError
from pipeline.shards.atomic import write_file
from pipeline.storage.location import Location, read_bytes

LABEL_SETS_NAME = "label-sets.json"
LabelSets = tuple[tuple[int, ...], ...]  # by label: numbers of classes, ascending; an empty one: none of the classes


def write_label_sets(directory: Location, sets: LabelSets) -> dict[str, Any]:
    """Publish the file; what the index says of it. The same sets give the same bytes."""
    content = json.dumps([list(one) for one in sets], separators=(",", ":")).encode() + b"\n"
    write_file(directory / LABEL_SETS_NAME, content)
    return {"count": len(sets), "sha256": hashlib.sha256(content).hexdigest()}


def read_label_sets(directory: Location, said: dict[str, Any], num_classes: int) -> LabelSets:
    """The sets of the dataset in `directory`; InputError where the file is not the one that the index speaks of."""
    path = directory / LABEL_SETS_NAME
    try:
        content = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: missing; restore it, or ingest the dataset again") from None
    if hashlib.sha256(content).hexdigest() != said["sha256"]:
        raise InputError(f"{path}: changed: its sha256 is not what the index says; restore it, or ingest again")
    sets = tuple(tuple(one) for one in json.loads(content))
    if len(sets) != said["count"] or not all(0 <= number < num_classes for one in sets for number in one):
        raise InputError(f"{path}: does not fit the {num_classes:,} classes of the index; ingest the dataset again")
    return sets


def label_matrix(sets: LabelSets | None, num_classes: int) -> np.ndarray:
    """(labels, classes) bool: which classes a label stands for; of a dataset without sets each label is its class."""
    if sets is None:
        return np.eye(num_classes, dtype=bool)
    matrix = np.zeros((len(sets), num_classes), dtype=bool)
    for label, numbers in enumerate(sets):
        matrix[label, list(numbers)] = True
    return matrix


def classes_of_labels(sets: LabelSets | None, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(entries,) labels, ascending, and the class of each entry: `label_matrix` of as many classes as there may be."""
    if sets is None:
        return np.arange(num_classes), np.arange(num_classes)
    labels = np.repeat(np.arange(len(sets)), [len(one) for one in sets])
    return labels, np.fromiter((number for one in sets for number in one), np.int64, len(labels))


def names_of(label: int, sets: LabelSets, classes: Sequence[str]) -> list[str]:
    """Class names of a label, as a sample's .json lists them."""
    return [classes[number] for number in sets[label]]
