"""What an encoder learns from, as typed configs without torch; the encoder's own stand in `encoder_config`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.encoder_config import SIZES as SIZES
from models.encoder_config import EncoderConfig as EncoderConfig
from models.schema import NOT_A_SWITCH, Config, Rate, Size


class DecoderConfig(Config):
    """The light transformer that a masked autoencoder throws away after pretraining."""

    embed_dim: Size = 512
    """Width of a decoder token."""
    depth: Size = 8
    """Number of blocks."""
    num_heads: Size = 16
    """Attention heads per block; divides embed_dim."""

    @model_validator(mode="after")
    def _check(self) -> "DecoderConfig":
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}, and of 4 for its "
                "sine-cosine positions"
            )
        return self


class SupervisedConfig(Config):
    """Predict the label of an image: softmax cross-entropy."""

    kind: Literal["supervised"] = "supervised"
    label_smoothing: Rate = 0.0
    """Share of the target spread evenly over all classes."""


class MaskedAutoencoderConfig(Config):
    """Masked autoencoder (arXiv:2111.06377): the encoder sees a few patches, a decoder predicts the others' pixels."""

    kind: Literal["mae"] = "mae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1), NOT_A_SWITCH] = 0.75
    """Share of the patches hidden from the encoder."""
    normalise_target: bool = True
    """Predict pixels normalised by the mean and deviation of their own patch (MAE's norm_pix_loss)."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder."""


ObjectiveConfig = Annotated[SupervisedConfig | MaskedAutoencoderConfig, Field(discriminator="kind")]
