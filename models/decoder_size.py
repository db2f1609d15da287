"""Size and arithmetic of the pixel decoder, from its config alone."""

from models.config import DecoderConfig, EncoderConfig


def decoder_parameters(decoder: DecoderConfig, encoder: EncoderConfig) -> int:
    width = decoder.embed_dim
    pixels = encoder.patch_size**2 * encoder.channels
    block = 12 * width * width + 13 * width
    embed = (encoder.embed_dim + 1) * width
    fixed = (encoder.num_patches + encoder.num_prefix_tokens) * width + width  # positions, mask token
    return decoder.depth * block + embed + fixed + 2 * width + (width + 1) * pixels


def decoder_macs(decoder: DecoderConfig, encoder: EncoderConfig, encoder_tokens: int) -> float:
    """Multiply-adds of one image's forward through the decoder; `encoder_tokens` enter it."""
    width, patches = decoder.embed_dim, encoder.num_patches
    tokens = patches + encoder.num_prefix_tokens
    block = 12 * tokens * width * width + 2 * tokens * tokens * width
    return (
        decoder.depth * block
        + encoder_tokens * encoder.embed_dim * width
        + patches * width * (encoder.patch_size**2 * encoder.channels)
    )
