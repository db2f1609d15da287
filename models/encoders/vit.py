"""The encoder: one of timm's plain Vision Transformers built from an EncoderConfig, and its tokens.

timm has three classes: VisionTransformer, VisionTransformerRelPos (relative positions) and Eva (rotary ones). All hold
`patch_embed`, `blocks`, `norm` and `head` by these names; what differs between them stands in this file alone.
"""

from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models import checkpoint, create_model
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit, named_apply
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from models.encoders.config import RELATIVE, SIZES, EncoderConfig
from models.encoders.positions import learned_axes, sincos_position_embedding, sinusoidal_position_embedding

Encoder = VisionTransformer | VisionTransformerRelPos | Eva

ROTARY_BASE = 100.0  # arXiv:2403.13298, section 3.2: patches are few, so the period is short


def timm_architecture(config: EncoderConfig) -> tuple[str, dict]:
    """A timm architecture name and the arguments that make it this encoder; what `config.json` of an export holds.

    They are what JSON can hold. `config.inexpressible` says what of the config they leave out.
    """
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
    if not config.qkv_bias or config.positions in RELATIVE:
        arguments["qkv_bias"] = config.qkv_bias
    if not config.class_token or config.positions in RELATIVE:
        arguments["class_token"] = config.class_token
    if config.layer_scale is not None:
        arguments["init_values"] = config.layer_scale
    if config.positions in RELATIVE:
        shared = config.positions == "relative_shared"
        own = {"rel_pos_type": "bias", "shared_rel_pos": shared, "fc_norm": config.pooling == "mean"}
        # timm drops arguments that are None, and this class scales its branches unless told otherwise
        return "vit_relpos_base_patch16_224", {"init_values": 0.0} | arguments | own
    if config.positions == "rotary":
        own = {
            "attn_type": "rope", "use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_temperature": ROTARY_BASE,
            "num_reg_tokens": config.register_tokens,
        }  # fmt: skip
        return "eva_giant_patch14_224", arguments | own  # the architecture that is Eva's own defaults
    return _plain_architecture(config), arguments | _plain_arguments(config)


def _plain_architecture(config: EncoderConfig) -> str:
    if config.distillation_token:
        return "deit_base_distilled_patch16_224"
    if config.norm_eps == 1e-5:
        return "vit_base_patch16_clip_224"
    words = {embed_dim: word for word, embed_dim, *_ in SIZES.values() if word != "2b"}
    word = words.get(config.embed_dim, "base")
    return f"vit_{word}_patch{ {'huge': 14, 'giant': 14, 'gigantic': 14}.get(word, 16) }_224"


def _plain_arguments(config: EncoderConfig) -> dict:
    arguments: dict = {}
    if config.norm_eps == 1e-5:
        arguments["pre_norm"] = False  # CLIP's networks have that eps, and a norm before the blocks
    if config.register_tokens:
        arguments["reg_tokens"] = config.register_tokens
    if config.activation == "gelu_tanh":
        arguments["act_layer"] = "gelu_tanh"
    if config.positions == "none":
        arguments["pos_embed"] = "none"
    return arguments


def build_encoder(config: EncoderConfig, num_classes: int = 0) -> Encoder:
    """A freshly initialised encoder; with `num_classes` a linear head on the pooled tokens, else none.

    Weights come from torch's global generator: seed it first where ranks must agree.
    """
    architecture, arguments = timm_architecture(config)
    if config.norm_eps != (1e-5 if architecture == "vit_base_patch16_clip_224" else 1e-6):
        arguments["norm_layer"] = partial(LayerNorm, eps=config.norm_eps)
    rates = {"drop_path_rate": config.drop_path_rate}
    if config.dropout:
        rates["proj_drop_rate"] = config.dropout
        if config.positions not in RELATIVE:
            rates["pos_drop_rate"] = config.dropout
    # 'jax' is the ViT paper's own initialisation: Xavier-uniform matrices, also MAE's choice.
    initial = {} if config.positions == "rotary" else {"weight_init": "jax"}
    encoder = create_model(architecture, pretrained=False, num_classes=num_classes, **rates, **initial, **arguments)
    if config.positions == "rotary":
        named_apply(get_init_weights_vit("jax", needs_reset=False), encoder)
    _place_positions(encoder, config)
    if config.representation:
        encoder.head_drop = Representation(config.embed_dim)
    if num_classes:  # a linear layer at zero: the first loss is log(V) and the first gradient reaches only the head
        for head in heads(encoder):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
    return encoder


class Representation(nn.Module):
    """The ViT paper's hidden layer of the pretraining head (arXiv:2010.11929, section 3.1), before `head`.

    Shape:
        pooled: (B, D), pooled tokens
        returns: (B, D) in -1..1
    """

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled).tanh()


def _place_positions(encoder: Encoder, config: EncoderConfig) -> None:
    """The tables of positions that timm does not make itself, in the place of its learned one."""
    grid, prefix = config.grid, config.num_prefix_tokens
    match config.positions:
        case "sincos2d":
            table = sincos_position_embedding(config.embed_dim, grid, prefix)
            encoder.pos_embed = nn.Parameter(table, requires_grad=False)
        case "sinusoidal1d":
            table = sinusoidal_position_embedding(config.embed_dim, config.num_patches, prefix)
            encoder.pos_embed = nn.Parameter(table, requires_grad=False)
        case "learned2d":
            learned_axes(encoder, grid, prefix)


def heads(encoder: Encoder) -> list[nn.Module]:
    """The class token's head, and the distillation token's where there is one."""
    return [encoder.head, *([encoder.head_dist] if hasattr(encoder, "head_dist") else [])]


def logits_by_head(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """(B, V) each: what every head says, of its own token. One head reads what the encoder pools."""
    tokens = encoder.forward_features(images)
    if not hasattr(encoder, "head_dist"):
        return [encoder.forward_head(tokens)]
    return [head(encoder.head_drop(tokens[:, place])) for place, head in enumerate(heads(encoder))]


def embed_patches(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens with their positions added, and the prefix tokens with theirs; before dropout.

    Shape:
        images: (B, C, H, W) float, normalised
        returns: patches (B, N, D), prefix (B, num_prefix_tokens, D)
    """
    return _add_positions(encoder, encoder.patch_embed(images))


def encode_visible(encoder: Encoder, images: Tensor, visible: Tensor) -> Tensor:
    """Encode only the visible patches: hidden ones never enter the network (MAE, section 3).

    Shape:
        images: (B, C, H, W) float, normalised
        visible: (B, K) int64
        returns: (B, prefix + K, D)
    """
    patches, prefix = embed_patches(encoder, images)
    kept = patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))  # (B, K, D)
    return encode_tokens(encoder, torch.cat([prefix, kept], dim=1), visible)


def encode_embedded(encoder: Encoder, embedded: Tensor) -> Tensor:
    """Encode patch embeddings that may have been changed; positions are added here, so none can be taken away.

    Shape:
        embedded: (B, N, D), as `encoder.patch_embed` gives them
        returns: (B, prefix + N, D)
    """
    patches, prefix = _add_positions(encoder, embedded)
    return encode_tokens(encoder, torch.cat([prefix, patches], dim=1))


def _add_positions(encoder: Encoder, patches: Tensor) -> tuple[Tensor, Tensor]:
    names = ("cls_token", "dist_token", "reg_token")
    tokens = [token for name in names if (token := getattr(encoder, name, None)) is not None]
    prefix = torch.cat([patches.new_zeros(1, 0, patches.shape[-1]), *(token.to(patches.dtype) for token in tokens)], 1)
    table = getattr(encoder, "pos_embed", None)
    if table is not None:
        positions, split = table.to(patches.dtype), encoder.num_prefix_tokens
        prefix, patches = prefix + positions[:, :split], patches + positions[:, split:]
    return patches, prefix.expand(patches.shape[0], -1, -1)


def encode_tokens(encoder: Encoder, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
    """Dropout, blocks and final norm over embedded tokens; rotary and relative positions follow the patches.

    Shape:
        tokens: (B, prefix + K, D), of `embed_patches`
        visible: (B, K) int64, the patches those tokens stand for; None where they are all, in order
        returns: (B, prefix + K, D)
    """
    if not isinstance(encoder, VisionTransformerRelPos):
        if getattr(encoder, "pos_embed", None) is not None or isinstance(encoder, Eva):
            tokens = encoder.pos_drop(tokens)
        tokens = encoder.norm_pre(tokens)
    of_block = _attention_positions(encoder, visible)
    for block in encoder.blocks:
        if encoder.grad_checkpointing:
            tokens = checkpoint(block, tokens, **of_block)
        else:
            tokens = block(tokens, **of_block)
    return encoder.fc_norm(encoder.norm(tokens))  # timm gives an encoder one of the two, by its pooling


def _attention_positions(encoder: Encoder, visible: Tensor | None) -> dict[str, Tensor]:
    """What each block's forward takes beside its tokens."""
    if isinstance(encoder, Eva):
        angles = encoder.rope.get_embed()  # (N, 2 * head width): sines and cosines
        return {"rope": angles if visible is None else angles[visible].unsqueeze(1)}  # (B, 1, K, 2 * head width)
    if not isinstance(encoder, VisionTransformerRelPos):
        return {}
    if encoder.shared_rel_pos is None:
        if visible is not None:
            raise ValueError("a block's own relative positions are those of all patches; take relative_shared")
        return {}
    bias = encoder.shared_rel_pos.get_bias()  # (1, heads, L, L)
    if visible is not None:
        prefix = encoder.num_prefix_tokens
        own = torch.arange(prefix, device=visible.device).expand(len(visible), -1)
        kept = torch.cat([own, visible + prefix], dim=1)  # (B, prefix + K)
        bias = bias[0][:, kept.unsqueeze(2), kept.unsqueeze(1)].transpose(0, 1)  # (B, heads, prefix + K, prefix + K)
    return {"shared_rel_pos": bias}
