"""The fixed sample that an export is judged on: the same images for the same model and dataset, always."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.errors import DataError, InputError
from pipeline.evaluation.features import evaluation_input_of
from pipeline.evaluation.single_images import normalised_views
from pipeline.loading.left_out import all_but_left_out
from pipeline.registry.locate import ModelSource, unknown_classes
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.shards.reader import Sample, node_reader

SPLITS = ("validation", "test", "train")  # the first that a dataset has


class FixedSample(NamedTuple):
    """Images as the model sees them."""

    images: np.ndarray  # (S, C, H, W) float32, normalised
    labels: np.ndarray | None  # (S,) int64, numbers of outputs; (S, V) bool where images have several classes
    words: str  # which images, and why no others
    dataset: dict[str, str] | None  # path, fingerprint and split

    @property
    def measure(self) -> str | None:
        """What is called accuracy; None without labels."""
        if self.labels is None:
            return None
        return "top-1" if self.labels.ndim == 1 else "mean average precision"


def fixed_sample(source: ModelSource, data: str | None, *, asked: bool, count: int) -> FixedSample:
    """At most `count` images of the dataset `data`, or built-in ones where it is None.

    Where nobody `asked` for the dataset, and it cannot be read any more, images are built-in, too, and `words` say why.
    """
    if data is None:
        return _built_in(source, count, "the model does not say what it was trained on")
    try:
        return _of_dataset(source, read_index(data), count)
    except (DataError, InputError, OSError) as error:
        if asked:
            raise InputError(f"--data {data}: {error}") from None
        return _built_in(source, count, f"{data} cannot be read ({str(error).splitlines()[0]})")


def _of_dataset(source: ModelSource, index: DatasetIndex, count: int) -> FixedSample:
    split = next(split for split in SPLITS if split in index.splits)
    samples = _spread(index, split, count)
    labels, lacking = _labels(source, index, [sample.label for sample in samples])
    words = f"{len(samples):,} images of {index.directory.name}, split {split}"
    return FixedSample(
        normalised_views(samples, source).numpy(), labels, words + (f"; {lacking}" if lacking else ""),
        {"path": str(index.directory), "fingerprint": index.remaining_fingerprint, "split": split},
    )  # fmt: skip


def _spread(index: DatasetIndex, split: str, count: int) -> list[Sample]:
    """At most `count` samples, evenly spread over a split, without those on the tombstone list."""
    reader = node_reader(index, split)
    scored = all_but_left_out(reader)
    sizes = enumerate(scored.shard_sizes.tolist())
    places = [(shard, scored.sample(shard, place)) for shard, size in sizes for place in range(size)]
    if len(places) < 2:
        raise InputError(f"split {split} has {len(places)} images, and parity takes two or more")
    count = min(count, len(places))
    return [reader.read(*places[number * len(places) // count]) for number in range(count)]


def _labels(source: ModelSource, index: DatasetIndex, labels: list[int]) -> tuple[np.ndarray | None, str]:
    """The labels as numbers of the head's outputs, or as sets of them; None, and in words why, where accuracy cannot be
    told."""
    if not source.num_classes:
        return None, "no accuracy, the model has no head"
    if min(labels) < 0:
        return None, "no accuracy, some have no label"
    if source.num_classes == 1 and index.label_sets is None:
        return None, "no accuracy, the head has one output"
    if not source.classes and source.num_classes != index.num_classes:
        return None, f"no accuracy, the head has {source.num_classes:,} classes without names"
    if source.classes and (reason := unknown_classes(source, index.classes)):
        return None, f"no accuracy, {reason}"
    named = [source.classes.index(name) if source.classes else number for number, name in enumerate(index.classes)]
    if index.label_sets is None:
        return np.array(named, np.int64)[labels], ""
    targets = np.zeros((len(labels), source.num_classes), bool)
    targets[:, named] = index.label_matrix()[labels]
    return (targets, "") if targets.any() else (None, "no accuracy, no image has a class")


def _built_in(source: ModelSource, count: int, why: str) -> FixedSample:
    """scikit-learn's handwritten digits, stretched to the input, grey in every channel."""
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images[:count]).float().div(16)[:, None]  # (S, 1, 8, 8) in 0..1
    inputs = evaluation_input_of(source)
    images = F.interpolate(digits, inputs.size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (source.mean, source.std))
    images = (images.expand(-1, inputs.channels, -1, -1) - mean) / std
    words = f"{len(images):,} built-in images (scikit-learn's digits), as {why}"
    return FixedSample(images.contiguous().numpy(), None, words, None)
