"""Weights of other libraries under timm's names, and timm's under theirs; see `layouts` for the names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.weights.layouts import VIT_PYTORCH, Layout, layout_of, our_name, their_name

_PARTS = ("q", "k", "v")


def to_timm(weights: Mapping[str, Tensor], channels: int = 3) -> tuple[dict[str, Tensor], Layout | None]:
    """The tensors under timm's names, and the layout they had; what the layout does not know keeps its name.

    Weights that have timm's names already come back as they are, with None. `channels` are those of the images: where a
    patch is embedded by a matrix, nothing else says them. Raises ValueError, with the reason, for a network that timm
    does not express.
    """
    layout, prefix = layout_of(weights)
    if layout is None:
        return dict(weights), None
    bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if layout is VIT_PYTORCH:
        bare = _plain_vit_pytorch(bare, channels)
    return _with_fused_attention({our_name(layout, name) or name: tensor for name, tensor in bare.items()}), layout


def from_timm(weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The inverse of `to_timm`, without a prefix; ValueError for a tensor that the layout has no place for."""
    apart = _with_attention_apart(weights) if "blocks.{i}.attn.q" in layout.modules else dict(weights)
    renamed = {}
    for name, tensor in apart.items():
        theirs = their_name(layout, name)
        if theirs is None:
            raise ValueError(f"{name}: {layout.name} has no such tensor")
        renamed[theirs] = tensor
    if layout is VIT_PYTORCH:
        kernel = renamed["to_patch_embedding.1.weight"]  # (D, C, P, P)
        renamed["to_patch_embedding.1.weight"] = kernel.permute(0, 2, 3, 1).flatten(1)
        renamed |= {name: renamed[name][0] for name in ("cls_token", "pos_embedding")}
        renamed["cls_token"] = renamed["cls_token"].reshape(1, -1)
    return renamed


def _with_fused_attention(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of a block in one matrix, as timm has them."""
    fused = {}
    for name, tensor in weights.items():
        block, _, part = name.rpartition(".attn.")
        word, _, suffix = part.partition(".")
        if not block or word not in _PARTS:
            fused[name] = tensor
        elif word == "q":
            fused[f"{block}.attn.qkv.{suffix}"] = torch.cat(
                [weights[f"{block}.attn.{each}.{suffix}"] for each in _PARTS]
            )
    return fused


def _with_attention_apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    apart = {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            parts = zip(_PARTS, tensor.chunk(3), strict=True)
            apart |= {name.replace(".qkv.", f".{word}."): part.clone() for word, part in parts}
        else:
            apart[name] = tensor
    return apart


def _plain_vit_pytorch(weights: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """With the patch embedding as a kernel and tokens in three dimensions; ValueError for what timm cannot express."""
    if "to_patch_embedding.2.weight" in weights:
        raise ValueError(
            "vit-pytorch: to_patch_embedding normalises the pixels of a patch before it embeds them, and timm's patch "
            "embedding has no such layer"
        )
    width, inner = weights["transformer.norm.weight"].numel(), weights["transformer.layers.0.0.to_qkv.weight"].shape[0]
    if inner != 3 * width:
        raise ValueError(
            f"vit-pytorch: heads * dim_head is {inner // 3} and dim is {width}; timm's attention is as wide as a token"
        )
    if "transformer.layers.0.0.to_out.0.weight" not in weights:
        raise ValueError("vit-pytorch: a single head as wide as the token has no to_out, and timm's always has one")
    if weights["cls_token"].numel() == 0:
        raise ValueError("vit-pytorch: pool='mean' has its norm before the mean, and timm's ViT behind it")
    kernel = weights["to_patch_embedding.1.weight"]  # (D, P * P * C)
    side = round((kernel.shape[1] / channels) ** 0.5)
    if side * side * channels != kernel.shape[1]:
        raise ValueError(f"vit-pytorch: {kernel.shape[1]} numbers of a patch are no square of {channels} channels")
    return weights | {
        "to_patch_embedding.1.weight": kernel.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2).contiguous(),
        "cls_token": weights["cls_token"].reshape(1, 1, width),
        "pos_embedding": weights["pos_embedding"].reshape(1, -1, width),
    }
