"""Size and arithmetic of CAPI's predictor, from its config alone."""

from models.encoders.config import EncoderConfig


def predictor_parameters(depth: int, encoder: EncoderConfig) -> int:
    width = encoder.embed_dim
    block = 12 * width * width + 2 * width
    return depth * block + encoder.num_patches * width + width  # positions, mask token


def predictor_macs(depth: int, encoder: EncoderConfig, context: int, predicted: int) -> float:
    """Multiply-adds of one image's forward: `predicted` patches look at `context` tokens."""
    width = encoder.embed_dim
    return depth * (10 * predicted * width * width + 2 * context * width * width + 2 * predicted * context * width)
