"""What the decoder of a masked autoencoder is, as a typed config without torch, and its size and arithmetic."""

from pydantic import model_validator

from models.encoders.config import EncoderConfig
from models.schema import Config, Size


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

    def parameters(self, encoder: EncoderConfig) -> int:
        """Behind this encoder, its fixed positions counted too."""
        width = self.embed_dim
        pixels = encoder.patch_size**2 * encoder.channels
        block = 12 * width * width + 13 * width
        embed = (encoder.embed_dim + 1) * width
        fixed = (encoder.num_patches + encoder.num_prefix_tokens) * width + width  # positions, mask token
        return self.depth * block + embed + fixed + 2 * width + (width + 1) * pixels

    def macs(self, encoder: EncoderConfig, entering: int) -> float:
        """Multiply-adds of one image's forward; `entering` tokens of the encoder's output come in."""
        width, patches = self.embed_dim, encoder.num_patches
        tokens = patches + encoder.num_prefix_tokens
        block = 12 * tokens * width * width + 2 * tokens * tokens * width
        pixels = encoder.patch_size**2 * encoder.channels
        return self.depth * block + entering * encoder.embed_dim * width + patches * width * pixels
