"""Pictures of the certificate's page, as data URIs: a contact sheet per class, and the pairs that are copies.

Bounded: at most 1,000 sheets, whose cells become fewer and smaller with the number of classes, so that the page of
1,000 classes stays below 15 MB. What a sheet shows are the first images of a class in the order of the dataset, which
is a shuffled one.
"""

import base64
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import DataError
from pipeline.ingestion.duplicates.likeness import viewable_pixels
from pipeline.ingestion.duplicates.search import CopySearch
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import node_reader

MOST_SHEETS = 1000
PAIRS_SHOWN = 12  # of a kind
PAIR_SIDE = 160  # pixels
LOSSLESS_BYTES = 1 << 20  # of pixels in all sheets, up to which they are PNG
SIZES = ((20, 24, 72), (200, 12, 64), (MOST_SHEETS, 6, 48))  # up to so many sheets: cells, pixels a side


@dataclass(frozen=True)
class Sheet:
    """`name` is a class or a split, `number` its place; `uri` a strip of `cells` squares, side by side."""

    name: str
    number: int
    uri: str
    cells: int
    side: int


def contact_sheets(index: DatasetIndex) -> list[Sheet]:
    """Of each class, in their order; of each split where there are no classes. What has no images has no sheet."""
    labelled = bool(index.classes)
    names = list(index.classes[:MOST_SHEETS]) if labelled else list(index.splits)
    num_cells, side = next((cells, side) for most, cells, side in SIZES if len(names) <= most)
    chosen = _first_of_classes(index, len(names), num_cells) if labelled else _first_of_splits(index, num_cells)
    found: list[list[Image.Image]] = [[] for _ in names]
    for split, shard, row, sheets in chosen:
        try:
            content = node_reader(index, split).read(shard, row, verify=False).image
            for sheet in sheets:
                found[sheet].append(_squared(_opened(content, side), side))
        except (DataError, ImageFault, OSError):
            continue
    side = max((cell.width for cells in found for cell in cells), default=side)
    lossless = sum(map(len, found)) * side * side * 3 <= LOSSLESS_BYTES
    return [
        Sheet(name, number, _uri(_strip(cells, side), lossless=lossless), len(cells), side)
        for number, (name, cells) in enumerate(zip(names, found, strict=True))
        if cells
    ]


def pair_pictures(facts: Mapping[str, Any], search: CopySearch | None) -> dict[int, str]:
    """By position: of the images of the first pairs of each kind; one that cannot be read any more is missing."""
    pictures: dict[int, str] = {}
    copies = facts["copies"] or {"examples": {}, "removed": {"examples": []}}
    for pairs in (*copies["examples"].values(), copies["removed"]["examples"]):
        for image in (image for pair in pairs[:PAIRS_SHOWN] for image in pair["images"]):
            position = image["_position"]
            try:
                if position not in pictures:
                    pictures[position] = _uri(_opened(search.dataset.read(position), PAIR_SIDE, whole=True))
            except (DataError, ImageFault, OSError):
                continue
    return pictures


Chosen = tuple[str, int, int, tuple[int, ...]]  # split, shard, row, sheets that show it


def _first_of_classes(index: DatasetIndex, num_classes: int, num_cells: int) -> Iterator[Chosen]:
    labels_of, classes_of = index.classes_of_labels()
    starts = np.searchsorted(labels_of, np.arange(index.num_labels + 1)).tolist()
    missing = np.where(np.arange(index.num_classes) < num_classes, num_cells, 0)
    for split in index.splits:
        reader = node_reader(index, split)
        for shard in range(len(reader.shard_sizes)):
            if not missing.any():
                return
            labels = reader.labels(shard)
            wanted = np.zeros(index.num_labels + 1, bool)  # the last: of NO_LABEL, -1
            wanted[labels_of[missing[classes_of] > 0]] = True
            for row in np.flatnonzero(wanted[labels]).tolist():
                classes = classes_of[starts[labels[row]] : starts[labels[row] + 1]]
                sheets = classes[missing[classes] > 0]
                if len(sheets):
                    missing[sheets] -= 1
                    yield split, shard, row, tuple(sheets.tolist())


def _first_of_splits(index: DatasetIndex, num_cells: int) -> Iterator[Chosen]:
    for number, split in enumerate(index.splits):
        sizes = node_reader(index, split).shard_sizes.tolist()
        places = ((shard, row) for shard, size in enumerate(sizes) for row in range(size))
        for (shard, row), _ in zip(places, range(2 * num_cells), strict=False):
            yield split, shard, row, (number,)


def _opened(content: bytes, side: int, *, whole: bool = False) -> Image.Image:
    """RGB; of a JPEG decoded no larger than needed. With `whole`, shrunk to fit into a square of `side`."""
    if content.startswith(b"\xff\xd8"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata does not matter here
            image = Image.open(io.BytesIO(content), formats=("JPEG",))
        if image.mode in ("L", "RGB"):
            image.draft(None, (2 * side, 2 * side))
        image = image.convert("RGB")
    else:
        image = viewable_pixels(content)
    if whole:
        image.thumbnail((side, side))
    return image


def _squared(image: Image.Image, side: int) -> Image.Image:
    """The square in the middle, of `side` pixels; of a smaller image as it is."""
    short = min(image.size)
    left, upper = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((min(side, short),) * 2, Image.Resampling.BOX, (left, upper, left + short, upper + short))


def _strip(cells: list[Image.Image], side: int) -> Image.Image:
    strip = Image.new("RGB", (side * len(cells), side), "white")
    for number, cell in enumerate(cells):
        shown = cell if cell.width == side else cell.resize((side, side), Image.Resampling.NEAREST)
        strip.paste(shown, (number * side, 0))
    return strip


def _uri(image: Image.Image, *, lossless: bool = False) -> str:
    buffer = io.BytesIO()
    if lossless or max(image.size) <= 64:
        image.save(buffer, "PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
