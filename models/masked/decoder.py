"""The masked autoencoder's decoder: visible tokens plus mask tokens in, pixels of every patch out."""

import torch
from timm.layers import LayerNorm
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.encoders.positions import sincos_position_embedding
from models.masked.decoder_config import DecoderConfig


class PixelDecoder(nn.Module):
    """A light transformer over the full sequence (MAE, section 3, "MAE decoder").

    Shape:
        tokens: (B, prefix + K, D), the encoder's output
        visible: (B, K) int64, the patches those tokens stand for
        returns: (B, N, P*P*C), a prediction for every patch
    """

    def __init__(self, config: DecoderConfig, *, encoder_dim: int, grid: tuple[int, int], prefix: int, patch_dim: int):
        super().__init__()
        width = config.embed_dim
        self.num_patches, self.num_prefix_tokens = grid[0] * grid[1], prefix
        self.embed = nn.Linear(encoder_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_position_embedding(width, grid, prefix)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.Sequential(*[Block(width, config.num_heads, qkv_bias=True) for _ in range(config.depth)])
        self.norm = LayerNorm(width)
        self.predict = nn.Linear(width, patch_dim)
        self.grad_checkpointing = False
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's encoders have it: keep only the blocks' inputs for backward and compute the rest again."""
        self.grad_checkpointing = enable

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        tokens = self.embed(tokens)  # (B, prefix + K, E)
        prefix, seen = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        index = visible.unsqueeze(-1).expand(-1, -1, seen.shape[-1])
        hidden = self.mask_token.to(seen.dtype).expand(len(seen), self.num_patches, -1)
        patches = hidden.scatter(1, index, seen)  # (B, N, E)
        tokens = torch.cat([prefix, patches], dim=1) + self.pos_embed.to(seen.dtype)
        tokens = checkpoint_seq(self.blocks, tokens) if self.grad_checkpointing else self.blocks(tokens)
        tokens = self.norm(tokens)
        return self.predict(tokens[:, self.num_prefix_tokens :])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
