"""Size and arithmetic of the encoder, from its config alone."""

from models.config import EncoderConfig


def encoder_parameters(encoder: EncoderConfig) -> int:
    """Parameters without a head, trained and fixed."""
    width, hidden = encoder.embed_dim, encoder.mlp_dim
    block = 4 * width * width + 4 * width + 2 * width * hidden + hidden + width + 4 * width
    patch = encoder.patch_size**2 * encoder.channels * width + width
    prefix = encoder.num_prefix_tokens
    return encoder.depth * block + patch + prefix * width + (encoder.num_patches + prefix) * width + 2 * width


def encoder_macs(encoder: EncoderConfig, patches: int | None = None) -> float:
    """Multiply-adds of one image's forward, of matrix products; with `patches` of all in the blocks.

    All patches are embedded, whichever go on into the blocks.
    """
    width, tokens = encoder.embed_dim, encoder_tokens(encoder, patches)
    block = tokens * (4 * width * width + 2 * width * encoder.mlp_dim) + 2 * tokens * tokens * width
    return encoder.depth * block + encoder.num_patches * encoder.patch_size**2 * encoder.channels * width


def encoder_tokens(encoder: EncoderConfig, patches: int | None = None) -> int:
    """Tokens in a block: `patches`, or all, and the prefix."""
    return (encoder.num_patches if patches is None else patches) + encoder.num_prefix_tokens
