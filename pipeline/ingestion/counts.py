"""What is counted of the images of a shard for the certificate: formats, modes, changes, colour profiles, sizes.

Sizes are counted in steps of half an octave: class i holds 2^(i/2) to 2^((i+1)/2) pixels or bytes.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import chain

from pipeline.ingestion.images import PreparedImage

Counts = dict[str, int]


@dataclass
class ImageCounts:
    """Counts by name; of `width`, `height` (pixels) and `bytes` by the number of the step."""

    images: int = 0
    formats: Counts = field(default_factory=dict)
    modes: Counts = field(default_factory=dict)
    changes: Counts = field(default_factory=dict)
    profiles: Counts = field(default_factory=dict)
    width: Counts = field(default_factory=dict)
    height: Counts = field(default_factory=dict)
    bytes: Counts = field(default_factory=dict)

    def merge(self, other: "ImageCounts") -> None:
        self.images += other.images
        for column in fields(self)[1:]:
            ours, theirs = getattr(self, column.name), getattr(other, column.name)
            for name, count in theirs.items():
                ours[name] = ours.get(name, 0) + count


class CountedImages:
    """Collects the images of one shard, a tuple each, which costs a thousandth of decoding one."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, str, str | None, tuple[str, ...], int, int, int]] = []

    def add(self, image: PreparedImage) -> None:
        self._seen.append(
            (image.format, image.mode, image.profile, image.changes, image.width, image.height, len(image.content))
        )

    def counts(self) -> ImageCounts:
        if not self._seen:
            return ImageCounts()
        formats, modes, profiles, changes, *sizes = zip(*self._seen, strict=True)
        named = (formats, modes, chain.from_iterable(changes), filter(None, profiles))
        return ImageCounts(len(self._seen), *(_counted(names) for names in named), *map(_steps, sizes))


def _counted(names: Iterable[str]) -> Counts:
    return dict(sorted(Counter(names).items()))


def _steps(sizes: Iterable[int]) -> Counts:
    steps: Counter[int] = Counter()
    for size, count in Counter(sizes).items():
        steps[math.floor(2 * math.log2(size) + 1e-9)] += count
    return {str(step): count for step, count in sorted(steps.items())}
