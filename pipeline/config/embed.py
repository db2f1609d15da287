"""The config of `vit embed`: which images a model makes features of, and which image is looked for among them."""

from typing import Annotated, Literal

from pydantic import Field

from models.schema import Config, Size, Text


class EmbedConfig(Config):
    """Features of every image of a dataset, as parquet files."""

    stage: Literal["embed"] = "embed"
    model: Text
    """The MODEL."""
    data: Text
    """The dataset directory, absolute."""
    destination: Text
    """The folder of the parquet files, absolute."""
    splits: Annotated[tuple[Literal["train", "validation", "test"], ...], Field(min_length=1)] = (
        "train", "validation", "test",
    )  # fmt: skip
    """Which splits, of those that the dataset has."""
    query: tuple[Text, ...] = ()
    """Image files, absolute: the images most like each are looked up in the destination."""
    nearest: Size = 10
    """How many are shown of those."""
    batch_size: Size = 64
    """Images per rank per forward."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network on an accelerator; what is written is float32."""
