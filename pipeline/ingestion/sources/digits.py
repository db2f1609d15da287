"""scikit-learn's handwritten digits, the images that come with an installed dependency."""

import hashlib
import io
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from pipeline.ingestion.sources.listing import Listing, SourceFile

DIGITS = "sklearn:digits"


@dataclass(frozen=True)
class DigitsSource:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, as split/class/number.png.

    Values 0..16 become 0..255. A fifth of each class, chosen by a hash of the digit's number, is the test split.
    """

    raw_form = "digits"  # pixels alone, made image files here

    def list_files(self) -> Listing:
        from sklearn.datasets import load_digits

        by_class: dict[int, list[int]] = {}
        for number, digit in enumerate(load_digits().target):
            by_class.setdefault(int(digit), []).append(number)
        paths = []
        for digit, numbers in by_class.items():
            numbers.sort(key=lambda number: hashlib.sha256(f"digits:{number}".encode()).digest())
            num_test = len(numbers) // 5
            paths += [f"test/{digit}/{number:04d}.png" for number in numbers[:num_test]]
            paths += [f"train/{digit}/{number:04d}.png" for number in numbers[num_test:]]
        return Listing([SourceFile(path, 0, 0) for path in sorted(paths)])

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        values = _digit_images()[int(PurePosixPath(path).stem)]
        buffer = io.BytesIO()
        Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()[: None if num_bytes < 0 else num_bytes]


@cache
def _digit_images() -> np.ndarray:
    from sklearn.datasets import load_digits

    return load_digits().images
