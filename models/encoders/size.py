"""Size and arithmetic of a plain ViT, from its config alone. Torch-free; tests hold it to the built module."""

from models.encoders.config import TABLES, EncoderConfig


def encoder_parameters(encoder: EncoderConfig) -> int:
    """Parameters without the linear head; a fixed table of positions counts too."""
    width, prefix = encoder.embed_dim, encoder.num_prefix_tokens
    patch = (encoder.patch_size**2 * encoder.channels + 1) * width
    representation = (width + 1) * width * encoder.representation
    return (
        encoder.depth * _block_parameters(encoder) + patch + prefix * width + _position_parameters(encoder)
        + 2 * width + representation
    )  # fmt: skip


def fixed_parameters(encoder: EncoderConfig) -> int:
    """Those of them that nobody trains: a table of positions made of sines."""
    return _position_parameters(encoder) if encoder.positions in ("sincos2d", "sinusoidal1d") else 0


def _block_parameters(encoder: EncoderConfig) -> int:
    width, hidden = encoder.embed_dim, encoder.mlp_dim
    attention = 4 * width * width + width + 3 * width * encoder.qkv_bias
    mlp = 2 * width * hidden + hidden + width
    scales = 2 * width * (encoder.layer_scale is not None)
    biases = _relative_parameters(encoder) if encoder.positions == "relative" else 0
    return attention + mlp + 4 * width + scales + biases


def _relative_parameters(encoder: EncoderConfig) -> int:
    """One table: a bias per offset and head, and three for the class token (BEiT, arXiv:2106.08254)."""
    rows, columns = encoder.grid
    return ((2 * rows - 1) * (2 * columns - 1) + 3 * encoder.class_token) * encoder.num_heads


def _position_parameters(encoder: EncoderConfig) -> int:
    if encoder.positions == "relative_shared":
        return _relative_parameters(encoder)
    if encoder.positions == "learned2d":
        return sum(encoder.grid) * (encoder.embed_dim // 2)
    if encoder.positions in TABLES:
        return (encoder.num_patches + encoder.num_prefix_tokens) * encoder.embed_dim
    return 0


def encoder_macs(encoder: EncoderConfig, patches: int | None = None) -> float:
    """Multiply-adds of one image's forward without the linear head; all are embedded, `patches` of them go on."""
    width, hidden, tokens = encoder.embed_dim, encoder.mlp_dim, encoder_tokens(encoder, patches)
    block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    embed = encoder.num_patches * encoder.patch_size**2 * encoder.channels * width
    return encoder.depth * block + embed + width * width * encoder.representation


def encoder_tokens(encoder: EncoderConfig, patches: int | None = None) -> int:
    """Tokens in a block: `patches`, or all, and the prefix."""
    return (encoder.num_patches if patches is None else patches) + encoder.num_prefix_tokens
