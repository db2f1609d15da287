"""Which samples a training reads, and in which order."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from models.schema import NOT_A_SWITCH, Config, Count, CountOrZero, Number, Positive, Share, Text


class Source(Config):
    """One dataset directory of the training data."""

    path: Text
    """The dataset directory, absolute."""
    weight: Positive = 1.0
    """How often its samples are drawn, relative to the other sources' weights."""
    window_shards: Count | None = None
    """As `data.window_shards`, for this source. None: `data.window_shards`."""


class DataConfig(Config):
    """Which samples are read, and in which order."""

    sources: tuple[Source, ...] = ()
    """Dataset directories; `--data` fills this in. Several are mixed by weight."""
    split: Text = "train"
    """The split that is trained on."""
    label_fraction: Share = 1.0
    """Share of each class's samples that is used, chosen by the samples' keys: 0.1 trains on a tenth. 1 is all."""
    max_samples: Count | None = None
    """At most so many samples of each dataset, chosen by their keys' hashes whatever their classes. None: all."""
    lanes: Count | None = None
    """Parallel reading lanes, a divisor of global_batch_size, fixed per run. None: the largest divisor up to 64."""
    window_shards: Count | None = None
    """Samples are shuffled within windows of this many consecutive shards of a lane. None: about 1 GiB of shards, a
    quarter of it of remote ones, and four times as much of adopted ones."""
    mean: Annotated[tuple[Number, ...], Field(min_length=1)] | None = None
    """Per channel, subtracted from pixels in 0..1. None: the started-from model's if it says, or the dataset's."""
    std: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """Per channel, what pixels are divided by. None: as for `mean`."""
    evaluation_crop: Annotated[float, Field(ge=0.1, le=1), NOT_A_SWITCH] = 0.875
    """Side of the centre crop as a share of the resized image in evaluation (timm's crop_pct); kept with the model."""
    evaluation_crop_mode: Literal["center", "squash", "border"] = "center"
    """How an image becomes that square (timm's crop_mode): `center` fits the shorter side and cuts the longer, `squash`
    fits both sides and distorts, `border` fits the longer side and pads with the mean colour; kept with the model."""
    verify: Literal["sampled", "full"] = "sampled"
    """Which samples' bytes are held against their checksum: one in 16, or all. Their sizes always are."""
    max_damaged: CountOrZero = 0
    """Samples that may prove damaged in the whole run; the next of the shard stands in for each. One more stops it."""
    skipped: tuple[tuple[CountOrZero, Count], ...] = ()
    """Ranges [from, to) of positions that are passed over, whole global batches to keep reading local."""
    record: bool = False
    """Write the step, position and key of every sample consumed to `samples/rank-*.tsv`."""

    @field_validator("skipped", mode="before")
    @classmethod
    def _looks_like_ranges(cls, ranges: Any) -> Any:
        pairs = isinstance(ranges, list | tuple) and all(isinstance(r, list | tuple) and len(r) == 2 for r in ranges)
        if not pairs:
            raise ValueError(f"expected ranges of positions, [[from, to], ...] (got {ranges!r})")
        return ranges

    @field_validator("skipped")
    @classmethod
    def _are_ranges(cls, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for start, end in ranges:
            if start >= end:
                raise ValueError(f"[{start}, {end}) is no range of positions")
        return ranges
