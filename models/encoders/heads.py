"""Heads beside the linear one: what stands in the place of timm's `head` in an encoder.

They are no part of timm's architectures, so a model that has one is evaluated here and never registered.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.head_config import AttentiveHeadConfig, HeadConfig, LinearHeadConfig

BATCH_NORM_EPS = 1e-6  # MAE's linear probe
BATCH_NORM_MOMENTUM = 0.1
PROBE_DEVIATION = 0.01  # MAE's and MoCo v3's start of a linear probe: LARS never leaves a zero by its own rule


class BatchNorm(nn.Module):
    """Features normalised by the micro-batch of their own rank in training, else by moving averages; nothing learned.

    The averages (arXiv:1502.03167, section 3.1) follow the mean of all ranks' statistics, so they are the same numbers
    on every rank: an evaluation is exact whatever the world size. They stay in float32 whatever the module is cast to.
    Collective in training: every rank must call it, as often as the others.

    Shape:
        features: (B, D) float, B at least 2 in training
        returns: (B, D) in the same dtype
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        numbers = features.float()
        if self.training:
            variance, mean = torch.var_mean(numbers, dim=0, correction=0)
            self._follow(mean.detach(), variance.detach() * (len(numbers) / (len(numbers) - 1)))
        else:
            variance, mean = self.running_var, self.running_mean
        return ((numbers - mean) * (variance + BATCH_NORM_EPS).rsqrt()).to(features.dtype)

    @torch.compiler.disable  # a collective and buffers that change: nothing for a graph
    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        both = torch.stack([mean, variance])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(both)
            both /= dist.get_world_size()
        self.running_mean.lerp_(both[0], BATCH_NORM_MOMENTUM)
        self.running_var.lerp_(both[1], BATCH_NORM_MOMENTUM)

    def _apply(self, fn, recurse: bool = True):
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():  # moved with the module, and never cast with it
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class BatchNormHead(nn.Module):
    """(B, D) pooled tokens to (B, V): see `LinearBatchNormHeadConfig`."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.norm, self.linear = BatchNorm(width), nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=PROBE_DEVIATION)
        nn.init.zeros_(self.linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.linear(self.norm(pooled))


class AttentiveHead(nn.Module):
    """Tokens to scores: see `AttentiveHeadConfig`. As many attention heads as the encoder has.

    A learned query takes from the normalised patch tokens what it attends to and is added to that; an MLP with a norm
    before it refines the sum.

    Shape:
        tokens: (B, prefix + N, D)
        returns: (B, V)
    """

    def __init__(self, config: AttentiveHeadConfig, width: int, num_heads: int, num_prefix_tokens: int, classes: int):
        super().__init__()
        self.num_heads, self.num_prefix_tokens = num_heads, num_prefix_tokens
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.norm_tokens = nn.LayerNorm(width, eps=1e-6)
        self.to_query, self.to_keys = nn.Linear(width, width), nn.Linear(width, width)
        self.to_values, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = None
        if hidden := config.hidden(width):
            norm = nn.LayerNorm(width, eps=1e-6)
            self.mlp = nn.Sequential(norm, nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif parameter.ndim == 1 and not parameter.eq(1).all():  # biases, and not the factors of norms
                nn.init.zeros_(parameter)
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        patches = self.norm_tokens(tokens[:, self.num_prefix_tokens :])
        query = self.query.to(patches.dtype)
        asked = self._by_head(self.to_query(query)).expand(len(patches), -1, -1, -1)  # (B, heads, 1, D / heads)
        attended = F.scaled_dot_product_attention(
            asked, self._by_head(self.to_keys(patches)), self._by_head(self.to_values(patches))
        )
        pooled = query + self.project(attended.transpose(1, 2).flatten(2))  # (B, 1, D)
        if self.mlp is not None:
            pooled = pooled + self.mlp(pooled)
        return self.linear(pooled[:, 0])

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def place_head(encoder: nn.Module, config: HeadConfig, num_classes: int) -> None:
    """Put the head in the place of a plain ViT's linear one, where it is another.

    Weights come from torch's global generator: seed it first where ranks must agree.
    """
    if isinstance(config, LinearHeadConfig) or not num_classes:
        return
    width = encoder.num_features
    if isinstance(config, AttentiveHeadConfig):
        heads = next(module.num_heads for module in encoder.blocks.modules() if hasattr(module, "num_heads"))
        encoder.global_pool = ""  # timm then hands all tokens, after the final norm, to the head
        encoder.head = AttentiveHead(config, width, heads, encoder.num_prefix_tokens, num_classes)
        return
    for name in ("head", "head_dist"):
        if hasattr(encoder, name):
            setattr(encoder, name, BatchNormHead(width, num_classes))
