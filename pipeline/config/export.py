"""The config of `vit export`: which model in which format, on which images it is judged, and what it must keep."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from models.schema import Config, Fraction, NonNegative, Size, Text

Format = Literal["safetensors", "hf", "onnx", "pt2", "int8"]
FORMATS: tuple[Format, ...] = get_args(Format)
HOLDS_ANY_GRAPH = ("onnx", "pt2", "int8")  # the others are weights for a network that another library has


class Bounds(Config):
    """What an export must keep of its source, on the fixed sample, to be written at all."""

    max_difference: NonNegative
    """Largest |difference| of any output (a logit, or a feature of a model without head), as a share of the largest
    |output| of the source."""
    max_share_of_spread: NonNegative
    """The same |difference| as a share of how far the source's outputs differ between images: the greatest less the
    least value, of the output where that is largest. An export that ignores the image has 0.5 or more."""
    min_agreement: Fraction
    """Share of the images of which both say the same: the first class; which classes are more likely than not (sigmoid,
    or one output); of a model without head, which other image of the sample is most alike."""
    max_accuracy_drop: Fraction
    """Accuracy of the source less that of the export, where the sample has labels that the head knows; of images with
    several classes mean average precision."""


_SAME_NUMBERS = {"max_difference": 1e-4, "max_share_of_spread": 0.01, "min_agreement": 0.99, "max_accuracy_drop": 0.005}
_ROUNDED_WEIGHTS = {
    "max_difference": 0.25,
    "max_share_of_spread": 0.25,
    "min_agreement": 0.97,
    "max_accuracy_drop": 0.01,
}
_FEWER_TOKENS = {"max_difference": 0.5, "max_share_of_spread": 0.4, "min_agreement": 0.97, "max_accuracy_drop": 0.01}


def default_bounds(format: str, *, fewer_tokens: bool) -> dict[str, float]:
    """The bounds of a format, where a person says no others: float32 formats compute the same numbers."""
    if fewer_tokens:
        return _FEWER_TOKENS
    return _ROUNDED_WEIGHTS if format == "int8" else _SAME_NUMBERS


class TokenReductionConfig(Config):
    """Similar patches become one behind every attention (token merging, arXiv:2210.09461)."""

    keep: Annotated[float, Field(gt=0, lt=1)]
    """Share of the patch tokens that is left behind the last block; every block merges as many."""


class ExportConfig(Config):
    """A model in a format that needs nothing of this project to be opened."""

    stage: Literal["export"] = "export"
    model: Text
    """The MODEL."""
    destination: Text
    """The new folder, absolute."""
    format: Format
    """safetensors: timm's own layout. hf: transformers' ViT. onnx: a graph for onnxruntime. pt2: torch.export's
    archive. int8: onnx with weights of 8 bits and activations rounded as they come."""
    data: Text | None = None
    """The dataset of the fixed sample, absolute; null: the one that the model was trained on where it is readable, else
    built-in images."""
    images: Annotated[int, Field(strict=True, ge=2, le=100_000)] = 256
    """How many images the fixed sample has, spread evenly over a split."""
    repeats: Size = 9
    """How often each latency is measured, export and source in turn; what is said is the median."""
    token_reduction: TokenReductionConfig | None = None
    """Fewer tokens, of onnx, pt2 and int8; null: all."""
    bounds: Bounds
    """By default those of the format, and wider where tokens are merged."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_bounds(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(given := raw.get("bounds", {}), dict):
            return raw
        defaults = default_bounds(raw.get("format", ""), fewer_tokens=raw.get("token_reduction") is not None)
        return raw | {"bounds": defaults | given}

    @model_validator(mode="after")
    def _format_holds_the_graph(self) -> "ExportConfig":
        if self.token_reduction is not None and self.format not in HOLDS_ANY_GRAPH:
            raise ValueError(
                f"token_reduction: format {self.format} is weights for a network that merges no tokens; take "
                f"{', '.join(HOLDS_ANY_GRAPH)}"
            )
        return self
