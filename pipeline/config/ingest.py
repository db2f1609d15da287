"""The config of `vit ingest`: how raw images become a dataset directory."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from models.schema import MOST, Config, Count, Fraction, Text

Split = Literal["train", "validation", "test"]


class IngestConfig(Config):
    """Everything about a dataset but its source and destination."""

    labels: Path | None = None
    """A .csv, .tsv or .jsonl file with one row per image: a column `path`, `file`, `filename`, `file_name`, `image`,
    `id` or `key` (a path in the source, or a name that only one file has, with or without its extension) and a column
    `class` or `label`. Integers below 100,000 stay what they are; anything else is a class name, and the sorted names
    are numbered. A column `classes` or `labels` in its place gives several per image: lists in .jsonl ([]: none of the
    classes, null: no label), values joined by `;` elsewhere (an empty cell: no label). Null: the folder of an image,
    below the split's, is its class, where there are at least two; so it is in a split that the file names nothing of,
    where its classes are such folders."""

    class_names: Path | None = None
    """A text file with the name of class 0 in its first line, of class 1 in its second and so on, for sources whose
    labels are numbers: idx, CIFAR without its meta file, tables without names, integers of `labels`."""

    image_column: Text | None = None
    """The column of a table (parquet, or saved by Hugging Face's datasets) that holds the images. Null: its only one of
    type Image, else the only one of bytes; where there are several, this key says which."""

    label_column: Text | None = None
    """The column of a table that holds integers or class names. Null: its only one of type ClassLabel, else the one
    called `class` or `label`; a table without any is unlabelled."""

    masks: Path | None = None
    """A folder with one mask per image, for segmentation: a .png of the image's path or name, grey or palette of 8
    bits, a pixel is the number of its class, 255 counts for nothing. Rejected are an image without a mask, and an image
    or a mask with an EXIF orientation: a mask of the file's pixels may fit the upright image in size and nothing else.
    Adopted tars keep theirs for other readers; for evaluation, ingest their files."""

    mask_classes: Annotated[tuple[Text, ...], Field(min_length=1, max_length=255)] | None = None
    """Names of the masks' classes, from number 0 on; a mask with another number is rejected. Null: the numbers."""

    boxes: Path | None = None
    """A .csv, .tsv or .jsonl file with one row per object, for detection: the image as in `labels`, `x`, `y`, `width`
    and `height` in pixels of the upright image from its upper left corner, and `class`. An image without rows holds
    no objects; one with a box that lies outside of it by more than a pixel is rejected."""

    splits: Literal["folders", "hash"] | dict[Split, Path] = "folders"
    """`folders`: the top-level folders train, validation (or val, valid) and test are the splits; a source without any
    is split by `hash`. `hash`: by content, with `split_fractions`, so that equal files are never in two splits.
    A mapping: split name -> file with one path per line, as in `labels`; images in no list are left out."""

    split_fractions: dict[Split, Fraction] = Field(default={"train": 0.9, "validation": 0.05, "test": 0.05})
    """Share of the files that each split gets, where they are split by hash; adds up to 1."""

    tars: Literal["adopt", "rewrite", "archive"] | None = None
    """What becomes of tars. `adopt`: WebDataset's stay where they are, read in place; only tables are written.
    `rewrite`: their images and labels (`.cls`, `.json`, `.txt`) are written anew: shuffled, upright, in shards of one
    size. `archive`: their members are files of folders, and of several tars each tar's name is a folder. Null, by the
    first tar: images in folders with no `.cls`, `.json` or `.txt` beside them are `archive`; anything else is
    WebDataset's, `adopt`, or `rewrite` where a tar is compressed. Images alone, in several tars whose names do not
    count up, may be either, and are asked about."""

    samples_per_shard: Count = 1000
    """Files per shard, rejected ones included: 1,000 photos of 110 kB are 110 MB."""

    seed: Annotated[int, Field(strict=True, ge=-MOST, le=MOST)] = 0
    """Decides the order of the samples in the shards, and the split where it is by hash."""

    channels: Literal["rgb", "keep"] = "rgb"
    """`rgb`: whatever plain decoding would get wrong is re-encoded: transparency on white, 16 bit as 8 bit. `keep`:
    channels and depth stay as they are, and .npy arrays are taken."""

    max_rejected_fraction: Fraction = 0.01
    """Above this share of rejected images nothing is published. Files that are no images do not count."""

    workers: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None
    """Processes that decode; null: one per core. The result is the same for any number."""

    @field_validator("split_fractions")
    @classmethod
    def _fractions_add_up(cls, fractions: dict[str, float]) -> dict[str, float]:
        if abs(sum(fractions.values()) - 1) > 1e-9:
            raise ValueError(f"the fractions add up to {sum(fractions.values()):g}, not to 1")
        return fractions

    @model_validator(mode="after")
    def _names_are_of_masks(self) -> Self:
        if self.mask_classes is not None and self.masks is None:
            raise ValueError("mask_classes: names classes of masks, and there are none; give their folder as `masks`")
        return self

    @model_validator(mode="after")
    def _lists_name_a_split(self) -> Self:
        if isinstance(self.splits, dict) and not self.splits:
            raise ValueError("splits: the mapping is empty; name at least one split and its list, or say `folders`")
        return self
