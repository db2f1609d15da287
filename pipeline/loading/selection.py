"""Some of a split's samples, chosen by their keys: the same samples whatever the seed or the world."""

import hashlib
from dataclasses import dataclass

import numpy as np

from pipeline.shards.reader import ShardReader


@dataclass(frozen=True)
class Selection:
    """Which samples of each shard take part. `chosen` is None where all do."""

    shard_sizes: np.ndarray
    chosen: tuple[np.ndarray, ...] | None = None

    def sample(self, shard: int, place: int) -> int:
        """The sample in the shard that is the `place`-th selected one."""
        return place if self.chosen is None else int(self.chosen[shard][place])

    def place(self, shard: int, sample: int) -> int | None:
        """The inverse of `sample`: None where the sample takes no part."""
        if self.chosen is None:
            return sample
        place = int(np.searchsorted(self.chosen[shard], sample))
        return place if place < len(self.chosen[shard]) and self.chosen[shard][place] == sample else None

    @classmethod
    def of(cls, reader: ShardReader, fraction: float, most: int | None = None) -> "Selection":
        """Round(fraction * class size) samples of each class, at least one, lowest hash of the key first; and of those
        the `most` of lowest hash, whatever their classes.

        Where images have several classes, all labelled ones are one class: most sets of classes are of few images.
        """
        if fraction == 1.0 and (most is None or most >= reader.shard_sizes.sum()):
            return cls(reader.shard_sizes)
        places: dict[int, list[tuple[bytes, int, int]]] = {}
        for shard in range(len(reader.shard_sizes)):
            keys, labels = reader.keys(shard), reader.labels(shard)
            for sample, (key, label) in enumerate(zip(keys, labels, strict=True)):
                digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
                of_class = min(int(label), 0) if reader.has_label_sets else int(label)
                places.setdefault(of_class, []).append((digest, shard, sample))
        shares = [sorted(of_class)[: max(1, round(fraction * len(of_class)))] for of_class in places.values()]
        taken: list[list[int]] = [[] for _ in reader.shard_sizes]
        for _, shard, sample in sorted(one for share in shares for one in share)[:most]:
            taken[shard].append(sample)
        chosen = tuple(np.array(sorted(samples), np.int64) for samples in taken)
        return cls(np.array([len(samples) for samples in chosen], np.int64), chosen)
