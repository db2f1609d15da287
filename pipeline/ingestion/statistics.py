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
    """Sums over images; `mean` and `mean_square` are per channel, None once images differed in their channels."""

    images: int = 0
    encoded_bytes: int = 0
    mean: list[float] | None = field(default_factory=list)
    mean_square: list[float] | None = field(default_factory=list)
    width: list[int] = field(default_factory=list)  # least, sum, greatest
    height: list[int] = field(default_factory=list)

    def add(self, image: PreparedImage) -> None:
        sizes = [[side] * 3 for side in (image.width, image.height)]
        self.merge(ImageTotals(1, len(image.content), list(image.mean), list(image.mean_square), *sizes))

    def merge(self, other: "ImageTotals") -> None:
        if not other.images:
            return
        self.mean = _added(self.mean, other.mean) if self.images else other.mean
        self.mean_square = _added(self.mean_square, other.mean_square) if self.images else other.mean_square
        self.width, self.height = _extended(self.width, other.width), _extended(self.height, other.height)
        self.images += other.images
        self.encoded_bytes += other.encoded_bytes

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


def _extended(ours: list[int], theirs: list[int]) -> list[int]:
    return [min(ours[0], theirs[0]), ours[1] + theirs[1], max(ours[2], theirs[2])] if ours else theirs
