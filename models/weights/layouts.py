"""How others name the tensors of a plain ViT, and what their networks are, without torch.

A layout is a table of module names; `foreign` reads it in both directions. LayerNorm's eps and the bias of queries,
keys and values belong to the layout: the same weights with another eps are another network.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from models.encoders.config import mlp_ratio_of


class Layout(NamedTuple):
    """Names of a library's ViT: ours to theirs, a module or a single tensor each; `{i}` is the number of a block."""

    name: str
    settings: dict[str, Any]  # of an EncoderConfig, where nothing else says them
    mark: str  # a tensor that no other layout has by this name
    modules: dict[str, str]


HUGGING_FACE = Layout(
    "Hugging Face",
    {"norm_eps": 1e-12},
    "embeddings.patch_embeddings.projection.weight",
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks.{i}.norm1": "encoder.layer.{i}.layernorm_before",
        "blocks.{i}.attn.q": "encoder.layer.{i}.attention.attention.query",
        "blocks.{i}.attn.k": "encoder.layer.{i}.attention.attention.key",
        "blocks.{i}.attn.v": "encoder.layer.{i}.attention.attention.value",
        "blocks.{i}.attn.proj": "encoder.layer.{i}.attention.output.dense",
        "blocks.{i}.norm2": "encoder.layer.{i}.layernorm_after",
        "blocks.{i}.mlp.fc1": "encoder.layer.{i}.intermediate.dense",
        "blocks.{i}.mlp.fc2": "encoder.layer.{i}.output.dense",
        "norm": "layernorm",
        "head_drop.fc": "pooler.dense",
        "head": "classifier",
    },
)
_SINCE_TRANSFORMERS_5 = {  # names in memory; its files keep the old ones
    r"(?<![\w.])layers\.(\d+)\.attention\.q_proj": r"encoder.layer.\1.attention.attention.query",
    r"(?<![\w.])layers\.(\d+)\.attention\.k_proj": r"encoder.layer.\1.attention.attention.key",
    r"(?<![\w.])layers\.(\d+)\.attention\.v_proj": r"encoder.layer.\1.attention.attention.value",
    r"(?<![\w.])layers\.(\d+)\.attention\.o_proj": r"encoder.layer.\1.attention.output.dense",
    r"(?<![\w.])layers\.(\d+)\.mlp\.fc1": r"encoder.layer.\1.intermediate.dense",
    r"(?<![\w.])layers\.(\d+)\.mlp\.fc2": r"encoder.layer.\1.output.dense",
    r"(?<![\w.])layers\.(\d+)\.layernorm": r"encoder.layer.\1.layernorm",
}
TORCHVISION = Layout(
    "torchvision",
    {"norm_eps": 1e-6},
    "conv_proj.weight",
    {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj",
        "blocks.{i}.norm1": "encoder.layers.encoder_layer_{i}.ln_1",
        "blocks.{i}.attn.qkv.weight": "encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight",
        "blocks.{i}.attn.qkv.bias": "encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias",
        "blocks.{i}.attn.proj": "encoder.layers.encoder_layer_{i}.self_attention.out_proj",
        "blocks.{i}.norm2": "encoder.layers.encoder_layer_{i}.ln_2",
        "blocks.{i}.mlp.fc1": "encoder.layers.encoder_layer_{i}.mlp.0",
        "blocks.{i}.mlp.fc2": "encoder.layers.encoder_layer_{i}.mlp.3",
        "norm": "encoder.ln",
        "head_drop.fc": "heads.pre_logits",
        "head": "heads.head",
    },
)
VIT_PYTORCH = Layout(
    "vit-pytorch",
    {"norm_eps": 1e-5, "qkv_bias": False},
    "transformer.layers.0.0.to_qkv.weight",
    {
        "cls_token": "cls_token",
        "pos_embed": "pos_embedding",
        "patch_embed.proj": "to_patch_embedding.1",
        "blocks.{i}.norm1": "transformer.layers.{i}.0.norm",
        "blocks.{i}.attn.qkv.weight": "transformer.layers.{i}.0.to_qkv.weight",
        "blocks.{i}.attn.proj": "transformer.layers.{i}.0.to_out.0",
        "blocks.{i}.norm2": "transformer.layers.{i}.1.net.0",
        "blocks.{i}.mlp.fc1": "transformer.layers.{i}.1.net.1",
        "blocks.{i}.mlp.fc2": "transformer.layers.{i}.1.net.4",
        "norm": "transformer.norm",
        "head": "mlp_head",
    },
)
LAYOUTS = (HUGGING_FACE, TORCHVISION, VIT_PYTORCH)


def layout_of(names: Collection[str]) -> tuple[Layout | None, str]:
    """The layout that tensors of these names have, and the prefix they stand under; None is timm's own, or unknown."""
    for layout in LAYOUTS:
        for name in names:
            if name == layout.mark or name.endswith("." + layout.mark):
                return layout, name.removesuffix(layout.mark)
    return None, ""


def our_name(layout: Layout, theirs: str) -> str | None:
    """timm's name of a tensor, of one without prefix; None for one that the layout does not have."""
    if layout is HUGGING_FACE:
        for pattern, old in _SINCE_TRANSFORMERS_5.items():
            theirs = re.sub(pattern, old, theirs)
    return _translated(theirs, {other: ours for ours, other in layout.modules.items()})


def their_name(layout: Layout, ours: str) -> str | None:
    """The layout's name of one of timm's tensors; None for one that the layout does not have."""
    return _translated(ours, layout.modules)


def _translated(name: str, table: Mapping[str, str]) -> str | None:
    for source, target in table.items():
        pattern = re.escape(source).replace(r"\{i\}", r"(\d+)") + r"(\.weight|\.bias|)"
        if match := re.fullmatch(pattern, name):
            *block, suffix = match.groups()
            return target.replace("{i}", *block) + suffix if block else target + suffix
    return None


_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def hugging_face_encoder(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The encoder that a config.json of transformers describes; ValueError with the reason where timm has no such one.

    `names` are those of its tensors: a pooler is there or not, whatever the config says.
    """
    if (kind := config.get("model_type")) not in ("vit", "vit_mae"):
        raise ValueError(f"model_type {kind!r} is not read; a plain ViT is: vit or vit_mae")
    if (activation := config.get("hidden_act", "gelu")) not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r}: timm's ViT has {', '.join(_ACTIVATIONS)}")
    pooled = any(name.endswith("pooler.dense.weight") for name in names)
    if pooled and (act := config.get("pooler_act", "tanh")) != "tanh":
        raise ValueError(f"pooler_act {act!r}: a representation head has tanh")
    size, width = config.get("image_size", 224), config["hidden_size"]
    return {
        "name": f"vit_b{config.get('patch_size', 16)}",
        "image_size": tuple(size) if isinstance(size, list) else size,
        "patch_size": config.get("patch_size", 16),
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": mlp_ratio_of(config["intermediate_size"], width),
        "channels": config.get("num_channels", 3),
        "positions": "sincos2d" if kind == "vit_mae" else "learned",
        "activation": _ACTIVATIONS[activation],
        "qkv_bias": config.get("qkv_bias", True),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "representation": pooled,
    }
