"""The config of `vit ingest`: how raw images become a dataset directory."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from models.schema import MOST, Config, Count, Fraction, Text

READABLE_PIXELS = 89_478_485  # what readers of datasets take, pipeline/shards/decoding.py

DaskAddress = Annotated[str, Field(strict=True, pattern=r"^(tcp|tls|ucx|ws|wss)://.+")]
Split = Literal["train", "validation", "test"]


class SplitConfig(Config):
    """What a split must not tear apart."""

    group: Text | None = None
    """What images that belong together share, such as a patient, a site or a video: a column of the labels file, or a
    regular expression whose first group in parentheses is found in their path, as `patient([0-9]+)`. A group is in one
    split: by a hash of its name where images are split by hash; folders or lists that tear one apart are refused."""


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
    labels are numbers: idx, CIFAR without its meta file, tables without names, tars, integers of `labels`."""

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
    """`folders`: the top-level folders train (or training), validation (val, valid, dev, eval) and test (testing), in
    any case, are the splits, or folders of these names below every class; a source without any is split by `hash`.
    `hash`: by content, with `split_fractions`, so that equal files are never in two splits.
    A mapping: split name -> file with one path per line, as in `labels`; images in no list are left out."""

    split_fractions: dict[Split, Fraction] = Field(default={"train": 0.9, "validation": 0.05, "test": 0.05})
    """Share of the files that each split gets, where they are split by hash; adds up to 1."""

    split: SplitConfig = SplitConfig()

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

    examine: Literal["pixels", "header"] = "pixels"
    """`pixels`: every image is decoded to its last pixel. `header`: an image that needs no rule keeps its bytes on the
    word of its header and of its last bytes, several times as fast. The shards are the same, but an image that is
    damaged in between is not found (`vit check --full` finds it), and there are no statistics of pixels: training
    needs `data.mean` and `data.std`."""

    colour: Literal["keep", "srgb"] = "keep"
    """`keep`: the values of the file, whatever its colour profile (ICC), as every training library reads them. `srgb`:
    an image whose profile is another is converted (relative colorimetric, black point compensation) and re-encoded; a
    profile that cannot be read, or is for other colours, is ignored, and `changes` says so."""

    max_side: Annotated[int, Field(strict=True, ge=1, le=65_500)] | None = None
    """Pixels of the longer side: a larger image is made smaller, with its mask and boxes, and re-encoded; none is made
    larger. Null: as it is."""

    quality: Annotated[int, Field(strict=True, ge=1, le=100)] = 95
    """Of the JPEGs (without chroma subsampling) and WebPs that are written anew; other files keep their bytes."""

    format: Literal["jpeg", "png", "webp"] | None = None
    """Every image becomes one of this format, unless it is. Null: JPEG, PNG, WebP and TIFF stay; of what must be
    written anew a JPEG becomes a JPEG, anything else a PNG."""

    max_pixels: Annotated[int, Field(strict=True, ge=1, le=2 * READABLE_PIXELS)] = READABLE_PIXELS
    """An image of more is rejected by its header alone, before any of it is decoded: a small file may claim to be huge.
    The default is the most that readers of datasets take; up to twice as many, with a `max_side` that makes less of
    them."""

    max_image_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """An image whose decoder has not returned by then is rejected."""

    max_read_seconds: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """A file whose bytes have not come by then ends the ingestion (exit 76), which names it: the disk or server that it
    lies on does not answer. The same command goes on from there. More where files are fetched from tapes first."""

    duplicates: Literal["report", "remove"] = "report"
    """What becomes of copies: images with the same pixels, and near copies, which a perceptual hash proposes and the
    pixels confirm. `report`: the certificate lists them. `remove`: copies leave the dataset, listed in
    `rejected.jsonl`: across splits and against `leakage_against` the copy that is trained on (of validation and test
    the validation image), equal or near; inside a split all but the first of equal pixels and label."""

    leakage_against: Annotated[tuple[Path, ...], Field(max_length=40)] = ()
    """Directories of ingested datasets that models will be evaluated on: their validation and test splits, or all of
    a dataset that has neither, are searched for copies of the images of train and validation."""

    max_rejected_fraction: Fraction = 0.01
    """Above this share of rejected images nothing is published. Files that are no images do not count."""

    workers: Annotated[int, Field(strict=True, ge=1, le=1024)] | DaskAddress | None = None
    """Processes that decode; null: one per core. Or the address of a Dask scheduler, as `tcp://host:8786`, whose
    workers see SOURCE and DEST under the same paths. The result is the same for any number and any place."""

    @property
    def processes(self) -> int | None:
        """`workers`, where they are of this machine."""
        return self.workers if isinstance(self.workers, int) else None

    @field_validator("split_fractions")
    @classmethod
    def _fractions_add_up(cls, fractions: dict[str, float]) -> dict[str, float]:
        if abs(sum(fractions.values()) - 1) > 1e-9:
            raise ValueError(f"the fractions add up to {sum(fractions.values()):g}, not to 1")
        return fractions

    @model_validator(mode="after")
    def _images_are_asked_what_can_be_done(self) -> Self:
        if self.channels == "keep":
            asked = {
                "colour": "srgb" if self.colour == "srgb" else None,
                "max_side": self.max_side,
                "format": self.format,
            }
            for key, value in asked.items():
                if value is not None:
                    raise ValueError(f"{key}: {value} needs channels=rgb; under `keep` images are stored as they are")
        if self.quality != 95 and self.format == "png":
            raise ValueError(
                f"quality: {self.quality} says nothing of a PNG; leave it out, or take format jpeg or webp"
            )
        if self.max_pixels > READABLE_PIXELS and (self.max_side or MOST) ** 2 > READABLE_PIXELS:
            side = math.isqrt(READABLE_PIXELS)
            raise ValueError(
                f"max_pixels: {self.max_pixels} is more than the {READABLE_PIXELS} that readers of datasets take; "
                f"say max_side as well, at most {side}"
            )
        return self

    @model_validator(mode="after")
    def _names_are_of_masks(self) -> Self:
        if self.mask_classes is not None and self.masks is None:
            raise ValueError("mask_classes: names classes of masks, and there are none; give their folder as `masks`")
        return self

    @model_validator(mode="after")
    def _copies_are_found_in_pixels(self) -> Self:
        if self.examine == "header" and (self.duplicates == "remove" or self.leakage_against):
            key = "duplicates: remove" if self.duplicates == "remove" else "leakage_against"
            raise ValueError(f"{key}: copies are found in pixels, which `examine: header` does not look at; drop one")
        return self

    @model_validator(mode="after")
    def _lists_name_a_split(self) -> Self:
        if isinstance(self.splits, dict) and not self.splits:
            raise ValueError("splits: the mapping is empty; name at least one split and its list, or say `folders`")
        return self
