"""Sums over images from which the statistics of a dataset are divided once, at the end.

Per shard they are added in the order of its samples, over shards in the order of the index: the result does not depend
on which worker was done first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.ingestion.images import PreparedImage
from pipeline.shards.index import ImageStatistics


@dataclass
class ImageTotals:
    """Sums over images; `mean` and `mean_square` are per channel, None once images differed in their channels or the
    pixels of one were not looked at."""

    images: int = 0
    encoded_bytes: int = 0
    mean: list[float] | None = field(default_factory=list)
    mean_square: list[float] | None = field(default_factory=list)
    width: list[int] = field(default_factory=list)  # least, sum, greatest
    height: list[int] = field(default_factory=list)

    def add(self, image: PreparedImage) -> None:
        self._add_moments(image.mean, image.mean_square)
        _add_side(self.width, image.width)
        _add_side(self.height, image.height)
        self.images += 1
        self.encoded_bytes += len(image.content)

    def merge(self, other: "ImageTotals") -> None:
        if not other.images:
            return
        self._add_moments(other.mean, other.mean_square)
        self.width, self.height = _extended(self.width, other.width), _extended(self.height, other.height)
        self.images += other.images
        self.encoded_bytes += other.encoded_bytes

    def _add_moments(self, mean: Sequence[float] | None, mean_square: Sequence[float] | None) -> None:
        if not self.images:
            self.mean = None if mean is None else list(mean)
            self.mean_square = None if mean_square is None else list(mean_square)
        elif self.mean is not None:
            self.mean, self.mean_square = _added(self.mean, mean), _added(self.mean_square, mean_square)

    def divided(self) -> ImageStatistics | None:
        if not self.images:
            return None
        mean = std = None
        if self.mean is not None and self.mean_square is not None:
            mean = tuple(total / self.images for total in self.mean)
            squares = (total / self.images for total in self.mean_square)
            std = tuple(math.sqrt(max(square - value**2, 0.0)) for square, value in zip(squares, mean, strict=True))
        sizes = [(float(least), total / self.images, float(most)) for least, total, most in (self.width, self.height)]
        return ImageStatistics(mean, std, self.encoded_bytes / self.images, *sizes)


def _added(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> list[float] | None:
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    return [one + other for one, other in zip(ours, theirs, strict=True)]


def _add_side(sums: list[int], side: int) -> None:
    if not sums:
        sums += (side, 0, side)
    elif side < sums[0]:
        sums[0] = side
    elif side > sums[2]:
        sums[2] = side
    sums[1] += side


def _extended(ours: list[int], theirs: list[int]) -> list[int]:
    return [min(ours[0], theirs[0]), ours[1] + theirs[1], max(ours[2], theirs[2])] if ours else list(theirs)
