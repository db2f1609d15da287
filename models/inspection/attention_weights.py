"""The attention weights of a ViT's blocks, whatever the block does before its softmax.

timm's fused attention keeps no weights. They are taken where timm's own unfused code drops them out, so whatever a
block does before (normalised queries and keys, relative bias, rotary positions) is in them. Each block's weights are
summarised as they are made: those of all blocks of a large model would not fit into memory together.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.inspection.display import NothingToDraw


@torch.no_grad()
def attention_by_block(
    encoder: nn.Module, images: Tensor, summarise: Callable[[Tensor], Tensor] = torch.clone
) -> list[Tensor]:
    """`summarise` of each block's attention weights, (B, heads, L, L) of which each row sums to 1; first block first.

    NothingToDraw where a block has no such weights.

    Shape:
        images: (B, C, H, W) float, normalised
    """
    with watched_blocks(encoder, summarise) as found:
        encoder.forward_features(images)
    return found


@contextlib.contextmanager
def watched_blocks(encoder: nn.Module, summarise: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """A list that one forward pass inside the block fills as `attention_by_block` says. NothingToDraw as there."""
    require_sequence(encoder)
    found: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(encoder.blocks):
            stack.enter_context(_watched(block.attn, number, found, summarise))
        yield found
    if len(found) != len(encoder.blocks):
        attention = type(encoder.blocks[0].attn).__name__
        raise NothingToDraw(f"{attention} shows no attention weights: {len(found)} of {len(encoder.blocks)} blocks did")


def relative_entropy(weights: Tensor) -> Tensor:
    """(B,): the entropy of each token's attention over the L tokens, as a share of log(L), mean over heads and tokens.

    1 is attention spread evenly over all tokens, 0 all of it on one (the entropy of arXiv:2303.06296, section 3, in
    units of its largest value).

    Shape:
        weights: (B, heads, L, L), of which each row sums to 1
    """
    return torch.special.entr(weights).sum(dim=-1).mean(dim=(1, 2)) / math.log(weights.shape[-1])


@contextlib.contextmanager
def _watched(attention: nn.Module, number: int, found: list[Tensor], summarise: Callable) -> Iterator[None]:
    def look(dropout: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        weights = arguments[0].float()
        if weights.dim() != 4 or weights.shape[1] != attention.num_heads:
            raise NothingToDraw(f"{type(attention).__name__} of block {number + 1} has not one map of weights per head")
        found.append(summarise(weights))

    fused = getattr(attention, "fused_attn", False)
    dropout = getattr(attention, "attn_drop", None)
    if not isinstance(dropout, nn.Module):
        raise NothingToDraw(f"{type(attention).__name__} of block {number + 1} shows no attention weights")
    attention.fused_attn = False
    hook = dropout.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
        attention.fused_attn = fused


def require_sequence(encoder: nn.Module) -> None:
    """NothingToDraw unless every block attends over one sequence of prefix tokens and all patches."""
    if not all(hasattr(encoder, name) for name in ("blocks", "patch_embed", "num_prefix_tokens")):
        raise NothingToDraw(f"{type(encoder).__name__} has no blocks that attend over all patches")
