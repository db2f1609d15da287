"""Visual prompts: learned tokens between the prefix tokens and the patches (VPT, arXiv:2203.12119).

Hooks around blocks put them in and take them out. The prompts are modules of the encoder's own, and not of the blocks,
since a hook of a block runs before ZeRO-3 has gathered it.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.tuning.config import VisualPromptTuning


class Prompts(nn.Module):
    """Puts its tokens behind the first `prefix` ones of every image.

    Shape:
        tokens: (B, prefix + N, D)
        returns: (B, prefix + P + N, D)
    """

    def __init__(self, prefix: int, embed_dim: int, config: VisualPromptTuning, patch_values: int):
        """`patch_values`: numbers of a patch; the start is Xavier's uniform, of patch and token (VPT, section 3)."""
        super().__init__()
        self.prefix = prefix
        self.tokens = nn.Parameter(torch.empty(1, config.tokens, embed_dim))
        bound = math.sqrt(6 / (patch_values + embed_dim))
        nn.init.uniform_(self.tokens, -bound, bound)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        own = self.drop(self.tokens.to(tokens.dtype).expand(len(tokens), -1, -1))
        return torch.cat([tokens[:, : self.prefix], own, tokens[:, self.prefix :]], dim=1)


def _put_in(prompts: Prompts, block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (prompts(arguments[0]), *arguments[1:])


def _take_out(prefix: int, count: int, block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.cat([output[:, :prefix], output[:, prefix + count :]], dim=1)


def place_prompts(encoder: nn.Module, config: VisualPromptTuning) -> None:
    """Before the first block, or every block; taken out behind the last, or that one. From torch's global generator."""
    prefix, blocks = encoder.num_prefix_tokens, list(encoder.blocks)
    patch_values = encoder.patch_embed.proj.weight[0].numel()
    stretches = [(block, block) for block in blocks] if config.depth == "deep" else [(blocks[0], blocks[-1])]
    encoder.prompts = nn.ModuleList(Prompts(prefix, encoder.embed_dim, config, patch_values) for _ in stretches)
    for prompts, (first, last) in zip(encoder.prompts, stretches, strict=True):
        first.register_forward_pre_hook(partial(_put_in, prompts))
        last.register_forward_hook(partial(_take_out, prefix, config.tokens))
