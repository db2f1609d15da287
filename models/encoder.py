"""The encoder: timm's VisionTransformer built from an EncoderConfig, and its tokens with or without hidden patches."""

import torch
from timm.models import checkpoint_seq, create_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.config import SIZES, EncoderConfig
from models.positions import sincos_position_embedding


def timm_architecture(config: EncoderConfig) -> tuple[str, dict]:
    """A timm architecture name and the arguments that make it this encoder; what `config.json` of an export holds."""
    widths = {embed_dim: word for word, embed_dim, *_ in SIZES.values()}
    word = widths.get(config.embed_dim, "base")
    patch = {"huge": 14, "giant": 14, "gigantic": 14}.get(word, 16)
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.channels,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "global_pool": {"token": "token", "mean": "avg"}[config.pooling],
    }
    return f"vit_{word}_patch{patch}_224", arguments


def build_encoder(config: EncoderConfig, num_classes: int = 0) -> VisionTransformer:
    """A freshly initialised encoder; with `num_classes` a linear head on the pooled tokens, else none.

    Weights come from torch's global generator: seed it first where ranks must agree.
    """
    architecture, arguments = timm_architecture(config)
    # 'jax' is the ViT paper's own initialisation: Xavier-uniform matrices, also MAE's choice.
    encoder = create_model(
        architecture, pretrained=False, num_classes=num_classes, drop_path_rate=config.drop_path_rate,
        weight_init="jax", **arguments,
    )  # fmt: skip
    if config.positions == "sincos2d":
        grid = encoder.patch_embed.grid_size
        table = sincos_position_embedding(config.embed_dim, grid, encoder.num_prefix_tokens)
        encoder.pos_embed = nn.Parameter(table, requires_grad=False)
    if num_classes:  # a linear layer at zero: the first loss is log(V) and the first gradient reaches only the head
        nn.init.zeros_(encoder.head.weight)
        nn.init.zeros_(encoder.head.bias)
    return encoder


def embed_patches(encoder: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens with their positions added, and the prefix tokens with theirs.

    Shape:
        images: (B, C, H, W) float, normalised
        returns: patches (B, N, D), prefix (B, num_prefix_tokens, D)
    """
    return _add_positions(encoder, encoder.patch_embed(images))


def encode_visible(encoder: VisionTransformer, images: Tensor, visible: Tensor) -> Tensor:
    """Encode only the visible patches: hidden ones never enter the network (MAE, section 3).

    Shape:
        images: (B, C, H, W) float, normalised
        visible: (B, K) int64
        returns: (B, prefix + K, D)
    """
    patches, prefix = embed_patches(encoder, images)
    kept = patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))  # (B, K, D)
    return _encode_tokens(encoder, torch.cat([prefix, kept], dim=1))


def encode_embedded(encoder: VisionTransformer, embedded: Tensor) -> Tensor:
    """Encode patch embeddings that may have been changed; positions are added here, so none can be taken away.

    Shape:
        embedded: (B, N, D), as `encoder.patch_embed` gives them
        returns: (B, prefix + N, D)
    """
    patches, prefix = _add_positions(encoder, embedded)
    return _encode_tokens(encoder, torch.cat([prefix, patches], dim=1))


def _add_positions(encoder: VisionTransformer, patches: Tensor) -> tuple[Tensor, Tensor]:
    prefix = torch.cat([t for t in (encoder.cls_token, encoder.reg_token) if t is not None], dim=1)
    positions = encoder.pos_embed.to(patches.dtype)
    split = encoder.num_prefix_tokens
    prefix = (prefix.to(patches.dtype) + positions[:, :split]).expand(len(patches), -1, -1)
    return patches + positions[:, split:], prefix


def _encode_tokens(encoder: VisionTransformer, tokens: Tensor) -> Tensor:
    tokens = encoder.norm_pre(tokens)
    tokens = checkpoint_seq(encoder.blocks, tokens) if encoder.grad_checkpointing else encoder.blocks(tokens)
    return encoder.fc_norm(encoder.norm(tokens))  # timm gives an encoder one of the two, by its pooling
