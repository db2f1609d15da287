"""CAPI's predictor: cross-attention from hidden positions to what the encoder made of the visible ones.

Each hidden position is predicted apart from the others: there is no attention among them, so only those that the loss
reads are computed. The paper tells both sides their positions by rotary embedding in every layer; here fixed 2-D
sine-cosine embeddings are added once, to the mask token and to the encoder's output.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.encoders.positions import sincos_position_embedding

MLP_RATIO = 4
EPS = 1e-5


class LatentPredictor(nn.Module):
    """Blocks of cross-attention and MLP without biases, as wide as the encoder (arXiv:2502.08769, section 3).

    Shape:
        tokens: (B, prefix + K, D), the encoder's output
        visible: (B, K) int64, the patches those tokens stand for
        hidden: (B, M) int64, the patches to predict
        returns: (B, M, D)
    """

    def __init__(self, width: int, depth: int, num_heads: int, grid: tuple[int, int], prefix: int, drop_path: float):
        super().__init__()
        self.prefix, self.grad_checkpointing = prefix, False
        self.pos_embed = nn.Parameter(sincos_position_embedding(width, grid, 0)[0], requires_grad=False)  # (N, D)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(CrossAttentionBlock(width, num_heads, drop_path) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's encoders have it: keep only the blocks' inputs for backward and compute the rest again."""
        self.grad_checkpointing = enable

    def forward(self, tokens: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        positions = self.pos_embed.to(tokens.dtype)
        context = torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix :] + positions[visible]], dim=1)
        queries = self.mask_token.to(tokens.dtype) + positions[hidden]
        for block in self.blocks:
            if self.grad_checkpointing:
                queries = checkpoint(block, queries, context, use_reentrant=False)
            else:
                queries = block(queries, context)
        return F.rms_norm(queries, queries.shape[-1:], eps=EPS)


class CrossAttentionBlock(nn.Module):
    """(B, M, D) queries and (B, L, D) context to (B, M, D)."""

    def __init__(self, width: int, num_heads: int, drop_path: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = RootMeanSquareNorm(width), RootMeanSquareNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, MLP_RATIO * width, bias=False)
        self.contract = nn.Linear(MLP_RATIO * width, width, bias=False)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        queries = queries + self.drop_path1(self.attend(self.norm1(queries), context))
        return queries + self.drop_path2(self.contract(F.gelu(self.expand(self.norm2(queries)))))

    def attend(self, queries: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.query(queries), self.key(context), self.value(context)
        parts = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        return self.project(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class RootMeanSquareNorm(nn.Module):
    """RMSNorm (arXiv:1910.07467) whose weight is brought to the input's dtype, as no fused kernel mixes two."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, values: Tensor) -> Tensor:
        return F.rms_norm(values, self.weight.shape, self.weight.to(values.dtype), eps=EPS)
