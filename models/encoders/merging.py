"""Token merging (Bolya et al., ICLR 2023, arXiv:2210.09461): similar patches become one token as blocks go by.

Nothing is learned. Made for timm's VisionTransformer; Eva and relative positions tie every token to its place.
"""

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from models.encoders.vit import embed_patches


def unmergeable(encoder: nn.Module) -> str | None:
    """Why the tokens of an encoder cannot be merged; None where they can."""
    if type(encoder).__name__ not in ("VisionTransformer", "VisionTransformerDistilled"):
        return "its attention ties every token to a place (relative or rotary positions), or it is no plain ViT"
    if any(type(block) is not Block or type(block.attn) is not Attention for block in encoder.blocks):
        return "its blocks are not the plain ones"
    if encoder.global_pool not in ("token", "avg"):
        return f"its head reads tokens by {encoder.global_pool}"
    return None


class MergingEncoder(nn.Module):
    """A ViT of which every block merges as many tokens, until `keep` of its patches are left behind the last.

    Between attention and MLP the patches are dealt into two halves in turn; of the first, those whose keys are most
    like one of the second are averaged into it (section 3, bipartite soft matching). A token counts for as many patches
    as it stands for, in later averages, in attention (equation 1) and in the mean that a head may read. Class and
    register tokens are never merged.

    Shape:
        images: (B, C, H, W) float, normalised
        returns: what the encoder returns, (B, V) or (B, D)
    """

    def __init__(self, encoder: VisionTransformer, keep: float):
        super().__init__()
        if reason := unmergeable(encoder):
            raise ValueError(f"tokens cannot be merged: {reason}")
        self.encoder = encoder
        self.merged = merged_per_block(encoder.patch_embed.num_patches, len(encoder.blocks), keep)

    def forward(self, images: Tensor) -> Tensor:
        encoder = self.encoder
        patches, prefix = embed_patches(encoder, images)
        num_prefix = encoder.num_prefix_tokens
        tokens = encoder.norm_pre(torch.cat([prefix, patches], dim=1))
        size = torch.ones_like(tokens[..., :1])  # (B, L, 1): patches that a token stands for
        for block, merged in zip(encoder.blocks, self.merged, strict=True):
            attended, metric = _attend(block.attn, block.norm1(tokens), size)
            tokens = tokens + block.ls1(attended)
            if merged:
                tokens, size = merge_similar(tokens, size, metric, merged, num_prefix)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        tokens = encoder.norm(tokens)
        if encoder.global_pool != "avg":
            return encoder.forward_head(tokens)
        kept, weight = tokens[:, num_prefix:], size[:, num_prefix:]
        pooled = encoder.fc_norm((kept * weight).sum(dim=1) / weight.sum(dim=1))
        return encoder.head(encoder.head_drop(pooled))


def merged_per_block(num_patches: int, depth: int, keep: float) -> list[int]:
    """How many tokens each block merges, so that round(keep * num_patches) are left; never more than half of what
    there is, so that of a very small `keep` more are left."""
    total, left, counts = num_patches - max(1, round(keep * num_patches)), num_patches, []
    for blocks_left in range(depth, 0, -1):
        count = min(math.ceil(total / blocks_left), left // 2)
        counts.append(count)
        total, left = total - count, left - count
    return counts


def _attend(attention: Attention, tokens: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in which a token has the weight of its patches (equation 1), and what tells tokens alike: (B, L, D) and
    (B, L, head width), the mean of the keys over heads."""
    batch, length, _ = tokens.shape
    shape = (batch, length, 3, attention.num_heads, attention.head_dim)
    queries, keys, values = attention.qkv(tokens).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    scores = attention.scale * queries @ keys.transpose(-2, -1) + size.log().transpose(1, 2).unsqueeze(1)
    mixed = scores.softmax(dim=-1) @ values  # (B, heads, L, head width)
    mixed = attention.norm(mixed.transpose(1, 2).reshape(batch, length, attention.attn_dim))
    return attention.proj(mixed), keys.mean(dim=1)


def merge_similar(tokens: Tensor, size: Tensor, metric: Tensor, merged: int, num_prefix: int) -> tuple[Tensor, Tensor]:
    """Average `merged` patch tokens into the ones most like them, weighted by size.

    Shape:
        tokens: (B, prefix + N, D)
        size: (B, prefix + N, 1)
        metric: (B, prefix + N, E)
        returns: (B, prefix + N - merged, D) and (B, prefix + N - merged, 1)
    """
    metric = F.normalize(metric[:, num_prefix:], dim=-1)
    likeness = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # (B, first half, second half)
    best, target = likeness.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    gone, kept = order[:, :merged], order[:, merged:].sort(dim=-1).values  # of the first half
    into = F.one_hot(target.gather(1, gone), metric[:, 1::2].shape[1]).to(tokens.dtype)  # (B, merged, second half)
    weighted, columns = torch.cat([tokens * size, size], dim=-1), tokens.shape[-1] + 1
    patches = weighted[:, num_prefix:]
    first, second = patches[:, ::2], patches[:, 1::2]
    second = second + into.transpose(1, 2) @ first.gather(1, gone.unsqueeze(-1).expand(-1, -1, columns))
    first = first.gather(1, kept.unsqueeze(-1).expand(-1, -1, columns))
    left = torch.cat([weighted[:, :num_prefix], first, second], dim=1)
    size = left[..., -1:]
    return left[..., :-1] / size, size
