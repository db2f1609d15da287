"""Scenes with known masks and boxes: scikit-learn's handwritten digits pasted at random places."""

import csv
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.build import IngestReport, ingest

SIDE = 64
CLASSES = ("ground", *(f"digit {number}" for number in range(10)))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


def scene(number: int, kinds: int = 10) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int, int, str]]]:
    """(64, 64) uint8 image of one to three digits, its mask of 1 + digit, and boxes with the names of their classes."""
    drawn = np.random.default_rng(number)
    images, targets = _digits()
    chosen = np.flatnonzero(targets < kinds)
    image, mask = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
    boxes: list[tuple[int, int, int, int, str]] = []
    for _ in range(int(drawn.integers(1, 4))):
        which = int(drawn.choice(chosen))
        side = int(drawn.integers(16, 29))
        x, y = (int(value) for value in drawn.integers(0, SIDE - side + 1, 2))
        glyph = np.asarray(Image.fromarray(images[which]).resize((side, side), Image.Resampling.BILINEAR))
        if mask[y : y + side, x : x + side].any():
            continue
        image[y : y + side, x : x + side] = glyph
        mask[y : y + side, x : x + side][glyph > 64] = 1 + targets[which]
        boxes.append((x, y, side, side, CLASSES[1 + targets[which]]))
    return image, mask, boxes


def write_scenes(folder: Path, count: dict[str, int], kinds: int = 10) -> Path:
    """`folder/images/SPLIT/N.png`, masks of the same paths in `folder/masks`, and `folder/boxes.csv`."""
    rows, number = [], 0
    for split, of_split in count.items():
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for _ in range(of_split):
            image, mask, boxes = scene(number, kinds)
            name = f"{split}/{number:04d}"
            Image.fromarray(image).convert("RGB").save(folder / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
            rows += [(name, *box) for box in boxes]
            number += 1
    with open(folder / "boxes.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "x", "y", "width", "height", "class"])
        writer.writerows(rows)
    return folder


def scene_dataset(folder: Path, count: dict[str, int], kinds: int = 10, **config: object) -> IngestReport:
    source = write_scenes(folder / "scenes", count, kinds)
    settings = {
        "masks": source / "masks", "mask_classes": CLASSES[: 1 + kinds], "boxes": source / "boxes.csv",
        "samples_per_shard": 16,
    }  # fmt: skip
    return ingest(str(source / "images"), folder / "dataset", IngestConfig(**(settings | config)))
