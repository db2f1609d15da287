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
    if config.distillation_token:
        return "deit_base_distilled_patch16_224", arguments
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
        for head in heads(encoder):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
    return encoder


def heads(encoder: VisionTransformer) -> list[nn.Module]:
    """The class token's head, and the distillation token's where there is one."""
    return [encoder.head, *([encoder.head_dist] if hasattr(encoder, "head_dist") else [])]


def logits_by_head(encoder: VisionTransformer, images: Tensor) -> list[Tensor]:
    """(B, V) each: what every head says, of its own token. One head reads what the encoder pools."""
    tokens = encoder.forward_features(images)
    if not hasattr(encoder, "head_dist"):
        return [encoder.forward_head(tokens)]
    return [head(encoder.head_drop(tokens[:, place])) for place, head in enumerate(heads(encoder))]


def embed_patches(encoder: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens with their positions added, and the prefix tokens with theirs.

    Shape:
        images: (B, C, H, W) float, normalised
        returns: patches (B, N, D), prefix (B, num_prefix_tokens, D)
    """
    patches = encoder.patch_embed(images)  # (B, N, D)
    tokens = (getattr(encoder, name, None) for name in ("cls_token", "dist_token", "reg_token"))
    prefix = torch.cat([token for token in tokens if token is not None], dim=1)
    positions = encoder.pos_embed.to(patches.dtype)
    split = encoder.num_prefix_tokens
    prefix = (prefix.to(patches.dtype) + positions[:, :split]).expand(len(images), -1, -1)
    return patches + positions[:, split:], prefix


def encode_visible(encoder: VisionTransformer, images: Tensor, visible: Tensor) -> Tensor:
    """Encode only the visible patches: hidden ones never enter the network (MAE, section 3).

    Shape:
        images: (B, C, H, W) float, normalised
        visible: (B, K) int64
        returns: (B, prefix + K, D)
    """
    patches, prefix = embed_patches(encoder, images)
    kept = patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))  # (B, K, D)
    tokens = encoder.norm_pre(torch.cat([prefix, kept], dim=1))
    tokens = checkpoint_seq(encoder.blocks, tokens) if encoder.grad_checkpointing else encoder.blocks(tokens)
    return encoder.norm(tokens)
