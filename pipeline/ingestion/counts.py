"""What is counted of the images of a shard for the certificate: formats, modes, changes, colour profiles, sizes.

Sizes are counted in steps of half an octave: class i holds 2^(i/2) to 2^((i+1)/2) pixels or bytes.
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import lru_cache

from PIL import Image, ImageCms

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

    def add(self, image: PreparedImage) -> None:
        self.images += 1
        _count(self.formats, [image.format])
        _count(self.modes, [image.mode])
        _count(self.changes, image.changes)
        _count(self.profiles, profile_names(image.pixels))
        _count(self.width, [step_of(image.width)])
        _count(self.height, [step_of(image.height)])
        _count(self.bytes, [step_of(len(image.content))])

    def merge(self, other: "ImageCounts") -> None:
        self.images += other.images
        for column in fields(self)[1:]:
            ours, theirs = getattr(self, column.name), getattr(other, column.name)
            for name, count in theirs.items():
                ours[name] = ours.get(name, 0) + count


def step_of(size: int) -> str:
    return str(math.floor(2 * math.log2(size) + 1e-9))


def profile_names(pixels: object) -> list[str]:
    """The name of the colour profile that the file carries, in a list; empty without one."""
    profile = pixels.info.get("icc_profile") if isinstance(pixels, Image.Image) else None
    return [_profile_name(profile)] if profile else []


@lru_cache(maxsize=64)
def _profile_name(profile: bytes) -> str:
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except Exception:  # of a damaged profile
        return "unreadable"
    return " ".join(name.split())[:60] or "unnamed"


def _count(counts: Counts, names: Iterable[str]) -> None:
    for name in names:
        counts[name] = counts.get(name, 0) + 1
