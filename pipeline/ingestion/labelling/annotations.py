"""Masks and boxes of a source's images: found before anything is written, held to their image when it is decoded."""

import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.errors import InputError
from pipeline.ingestion.images import UPRIGHT, file_orientation
from pipeline.ingestion.labelling.labels import (
    LABEL_COLUMNS,
    NO_CLASS,
    file_of_row,
    match_files,
    number_classes,
    possible_names,
    table_rows,
)
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.folder import FolderSource
from pipeline.ingestion.sources.listing import named_like_image
from pipeline.shards.annotations import (
    Box,
    annotation_bytes,
    boxes_fault,
    cut_to,
    decode_mask,
    encoded_mask,
    greatest_class,
    grey_mask,
    mask_fault,
    scaled,
)
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import shortened

if TYPE_CHECKING:  # configs are not for the processes that decode: pydantic takes longer to import than all the rest
    from pipeline.config.ingest import IngestConfig

# Names of folders that hold the masks of the images in a folder beside them.
MASK_FOLDERS = frozenset(
    "mask masks segmentation segmentations segmentationclass segmentationclassaug segmentationobject annotations "
    "labels labelimages gt groundtruth ground_truth ground-truth gtfine".split()
)
SIDES = ("x", "y", "width", "height")


class MaskFile(NamedTuple):
    """`path` is relative to the folder of masks; `stamp` changes with the content."""

    path: str
    bytes: int
    stamp: int


@dataclass(frozen=True)
class AnnotationRule:
    """What a shard job does about masks and boxes: the same for all of a dataset, and small."""

    masks: Path | None = None
    mask_classes: int | None = None  # None: as many as are found
    box_classes: int | None = None  # None: there are no boxes

    @property
    def asks(self) -> bool:
        return self.masks is not None or self.box_classes is not None


@dataclass(frozen=True)
class FoundAnnotations:
    """The rule, and what was found of each image by its path."""

    rule: AnnotationRule = AnnotationRule()
    masks: Mapping[str, MaskFile] = field(default_factory=dict)
    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)
    mask_classes: tuple[str, ...] | None = None
    box_classes: tuple[str, ...] | None = None
    surplus: tuple[Rejected, ...] = ()  # masks without an image


class PreparedAnnotations(NamedTuple):
    """What goes into the shard beside an image; `classes` is one more than the greatest class of its mask."""

    mask: bytes | None = None
    boxes: list[list[float]] | None = None
    classes: int = 0
    digested: bytes = b""  # what the fingerprint takes of them


_NOTHING = PreparedAnnotations()


def find_annotations(
    config: "IngestConfig", files: Sequence[str], others: Sequence[str] = (), source: str = ""
) -> FoundAnnotations:
    """InputError where a mask or a row names no image of `files`, nor one of `others`, or is none."""
    masks, surplus = _find_masks(config.masks, files, others) if config.masks else ({}, ())
    boxes, box_classes = _read_boxes(config.boxes, files, others, source) if config.boxes else ({}, None)
    names = config.mask_classes
    rule = AnnotationRule(
        config.masks, len(names) if names else None, None if box_classes is None else len(box_classes)
    )
    return FoundAnnotations(rule, masks, boxes, names, box_classes, surplus)


def require_no_masks(source: str, files: Sequence[str], masks: Path | None) -> None:
    """InputError, with what to type, where a folder of the source holds the masks of the images of another.

    It would make two classes of them: `images/7.jpg` and `masks/7.png`. Known by the folder's name, and by holding .png
    files alone each of which has the name of an image in the other.
    """
    found = _masks_beside(files)
    if masks is not None and masks.resolve().is_relative_to(os.path.realpath(source)):
        images = os.path.join(source, found[0]) if found else "IMAGES"
        fix = f"give the folder of the images alone: vit ingest {images} DEST --set masks={masks}"
        raise InputError(f"{masks}: masks: lies in the source {source}, which would take its masks for images; {fix}")
    if masks is None and found:
        images, folder = (os.path.join(source, name) for name in found)
        what = f"{folder} seems to hold masks of {images}, not a class of images"
        fix = f"vit ingest {images} DEST --set masks={folder}; if it is a class, give its folder another name"
        raise InputError(f"{source}: {what}: {fix}")


def _masks_beside(files: Sequence[str]) -> tuple[str, str] | None:
    """(folder of images, folder of their masks), relative to the source; None where there are none.

    Of several, such as VOC's masks of classes and of objects, the first.
    """
    folders = {file.rpartition("/")[0] for file in files}
    named = sorted({
        "/".join(parts[: depth + 1])
        for parts in (folder.split("/") for folder in folders)
        for depth, part in enumerate(parts)
        if part.lower() in MASK_FOLDERS
    })  # fmt: skip
    if not named:  # the usual case
        return None
    beside = _stems_beside(files, {masks.rpartition("/")[0] for masks in named})
    for masks in named:
        above, _, name = masks.rpartition("/")
        by_folder, start = beside[above], f"{above}/" if above else ""
        if (own := by_folder[name]).all_png:
            for folder, found in sorted(by_folder.items()):
                if folder.lower() not in MASK_FOLDERS and own.stems <= found.stems:
                    return start + folder, masks
    return None


@dataclass
class _FolderFiles:
    """The paths in a folder without their extensions, and whether that is .png for all of them."""

    stems: set[str] = field(default_factory=set)
    all_png: bool = True


def _stems_beside(files: Sequence[str], folders: Container[str]) -> dict[str, dict[str, _FolderFiles]]:
    """Of each of `folders`: the folders directly in it, and what is in them, in one pass over the files."""
    beside: dict[str, dict[str, _FolderFiles]] = {}
    for file in files:
        stem, extension = os.path.splitext(file)
        start = 0
        while (end := file.find("/", start)) >= 0:
            above = file[: max(0, start - 1)]
            if above in folders:
                found = beside.setdefault(above, {}).setdefault(file[start:end], _FolderFiles())
                found.stems.add(stem[end + 1 :])
                found.all_png &= extension.lower() == ".png"
            start = end + 1
    return beside


def prepare_annotations(
    rule: AnnotationRule, mask: MaskFile | None, boxes: Sequence[Box], image: bytes, size: tuple[int, int],
    stored: tuple[int, int] | None = None,
) -> PreparedAnnotations:  # fmt: skip
    """Of an image's file and its (width, height) upright, made to the size it is stored in, if that is another.

    ImageFault `no_mask`, `bad_mask` or `bad_box`, or as reading a file does.
    """
    if not rule.asks:
        return _NOTHING
    values, content, classes, cut = None, None, 0, None
    if rule.masks is not None:
        if mask is None:
            raise ImageFault("no_mask", f"no .png of its name in {rule.masks}")
        content = _read(rule.masks / mask.path)
        _require_upright(image, content)
        values = decode_mask(content)
        if fault := mask_fault(values, size, rule.mask_classes):
            raise ImageFault("bad_mask", fault)
        if stored is not None:
            values = np.asarray(Image.fromarray(values).resize(stored, Image.Resampling.NEAREST))
            content = encoded_mask(values)
        content, classes = grey_mask(content, values), greatest_class(values) + 1
    if rule.box_classes is not None:
        if fault := boxes_fault(boxes, size, rule.box_classes):
            raise ImageFault("bad_box", fault)
        cut = cut_to(boxes, size)
        cut = cut if stored is None else cut_to(scaled(cut, size, stored), stored)
    return PreparedAnnotations(content, cut, classes, annotation_bytes(values, cut))


def _require_upright(image: bytes, mask: bytes) -> None:
    """A mask drawn on the file's pixels and one drawn on what a viewer shows can be of one size."""
    for what, content in (("the image", image), ("its mask", mask)):
        if (orientation := file_orientation(content)) in UPRIGHT:
            raise ImageFault(
                "bad_mask", f"{what} has EXIF orientation {orientation}, so whether mask and image lie alike cannot be "
                "told; save both upright, without an orientation"
            )  # fmt: skip


def mask_class_names(found: FoundAnnotations, classes: int) -> tuple[str, ...] | None:
    """The names of the index: those given, else the numbers of the classes that were found."""
    if found.rule.masks is None:
        return None
    return found.mask_classes or tuple(map(str, range(classes)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageFault("bad_mask", f"{path}: cannot be read ({error.strerror})") from None


def _find_masks(
    folder: Path, files: Sequence[str], others: Sequence[str]
) -> tuple[dict[str, MaskFile], tuple[Rejected, ...]]:
    """Image -> its mask: the .png of its path, or of its name, whatever the image's extension; and the masks that are
    nobody's, which count as lost images."""
    if not folder.is_dir():
        raise InputError(f"{folder}: masks: no such folder; the path is relative to the working directory")
    listing = FolderSource(folder).list_files()
    wrong = [file.path for file in listing.images if os.path.splitext(file.path)[1].lower() != ".png"]
    wrong = [path for path in wrong if named_like_image(path)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{folder}: masks: {wrong[0]}{more}: no .png; a mask is a .png whose pixels are class numbers")
    rows = {os.path.splitext(file.path)[0]: MaskFile(*file) for file in listing.images}
    if not rows:
        raise InputError(f"{folder}: masks: holds no .png")
    known = {name for file in (*files, *others) for name in possible_names(file)}
    surplus = [row for row in rows if row not in known]
    rejected = tuple(
        Rejected(f"masks/{rows[row].path}", "mask_without_image", f"in {folder}, and no image has its name")
        for row in surplus
    )
    if len(surplus) == len(rows):
        raise InputError(f"{folder}: masks: {surplus[0]}.png: a mask without an image, as are all; masks and images "
                         "have the same paths or names")  # fmt: skip
    named = {row: mask for row, mask in rows.items() if row in known}
    return match_files(named, files, folder, others), rejected


def _read_boxes(
    path: Path, files: Sequence[str], others: Sequence[str], source: str
) -> tuple[dict[str, tuple[Box, ...]], tuple[str, ...]]:
    """Image -> its boxes, by the order of the rows, and the names of their classes. An image without rows has none."""
    rows: dict[str, list[tuple[list[float], str]]] = {}
    problems = []
    for line, row in table_rows(path, "boxes"):
        name, box, fault = _box_of_row(path, line, row)
        if fault:
            problems.append(f"{path}:{line}: {fault}")
            continue
        rows.setdefault(name, []).extend([box] if box else [])
    if problems:
        raise InputError(*shortened(problems))
    numbered = number_classes({name: name for boxes in rows.values() for _, name in boxes})
    if numbered.classes is None:
        raise InputError(f"{path}: boxes: holds no box")
    by_name = {
        name: tuple((*sides, numbered.by_path[class_name]) for sides, class_name in boxes)
        for name, boxes in rows.items()
    }
    return match_files(by_name, files, path, others, source=source), numbered.classes


def _box_of_row(
    path: Path, line: int, row: Mapping[str, Any]
) -> tuple[str, tuple[list[float], str] | None, str | None]:
    """(name of the image, its box and class, what is wrong); a row that names an image alone has no box."""
    name = file_of_row(row)
    label_column = next((column for column in LABEL_COLUMNS if column in row), None)
    missing = [column for column in SIDES if column not in row]
    if name is None or label_column is None or missing:
        columns = ", ".join(map(str, row))
        raise InputError(f"{path}:{line}: boxes: rows have path, x, y, width, height, class; it has: {columns}")
    values = [row[column] for column in (*SIDES, label_column)]
    if name and all(value is None or str(value).strip() == "" for value in values):
        return name, None, None
    label = "" if values[4] is None else str(values[4]).strip()
    if not name or not label or NO_CLASS.fullmatch(label) or isinstance(values[4], (bool, float, list, dict)):
        return name, None, f"{label_column} {values[4]!r}: a row holds a file, a box and its class"
    try:
        sides = [float(value) for value in values[:4]]
    except (TypeError, ValueError):
        sides = [math.nan]
    if not all(map(math.isfinite, sides)):
        return name, None, f"x, y, width, height {values[:4]}: not four numbers"
    return name, (sides, label), None
