"""Adapters: small bottlenecks in every block of a frozen encoder (arXiv:1902.00751; AdaptFormer, arXiv:2205.13535).

They are children of the block's `attn` and `mlp`, whose outputs a hook changes: no other name in the encoder changes,
and ZeRO-3 gathers them with their block.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.tuning.config import AdapterTuning


class Adapter(nn.Module):
    """Down to a bottleneck, GELU, dropout, up again; adds nothing in the beginning, as `up` is zero.

    Shape:
        tokens: (B, L, D)
        returns: (B, L, D)
    """

    def __init__(self, embed_dim: int, config: AdapterTuning):
        super().__init__()
        self.down, self.up = nn.Linear(embed_dim, config.width), nn.Linear(config.width, embed_dim)
        self.drop, self.scale = nn.Dropout(config.dropout), config.scale
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.up(self.drop(F.gelu(self.down(tokens)))) * self.scale


def _behind(part: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + part.adapter(output)


def _beside(part: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + part.adapter(arguments[0])


def place_adapters(encoder: nn.Module, config: AdapterTuning) -> None:
    """Into every block of a plain ViT, freshly initialised from torch's global generator."""
    for block in encoder.blocks:
        if config.placement == "parallel":
            _place(block.mlp, encoder.embed_dim, config, _beside)
        else:
            _place(block.attn, encoder.embed_dim, config, _behind)
            _place(block.mlp, encoder.embed_dim, config, _behind)


def _place(part: nn.Module, embed_dim: int, config: AdapterTuning, change: Any) -> None:
    part.adapter = Adapter(embed_dim, config)
    part.register_forward_hook(change)
