"""Optimizers over parameter groups: no decay where it hurts, and a learning-rate factor per layer."""

import re
from typing import assert_never

import torch
from timm.optim import Lamb, Lars
from torch import nn

from models.encoders.timm_network import layers_of
from models.objectives.batch import Factors
from pipeline.config.optimizer import (
    AdamWConfig,
    LambConfig,
    LarsConfig,
    OptimizerConfig,
    ScheduledOptimizerConfig,
    SGDConfig,
)

_BLOCK = re.compile(r"encoder\.(?:blocks|prompts)\.(\d+)\.")
_STEM = (
    "encoder.patch_embed", "encoder.pos_embed", "encoder.parametrizations.pos_embed", "encoder.cls_token",
    "encoder.reg_token", "encoder.dist_token", "encoder.norm_pre", "encoder.shared_rel_pos",
)  # fmt: skip
_NEVER_DECAYED = re.compile(
    r"(pos_embed|cls_token|reg_token|dist_token|mask_token|head\.query|relative_position_bias_table|prompts|lora_E)\b"
)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to norms, biases, factors, tokens or positions."""
    return parameter.ndim > 1 and not _NEVER_DECAYED.search(name)


def layer_of(name: str, depth: int) -> int:
    """0 for the embedding, i + 1 for block i, depth + 1 for what follows (as in BEiT, arXiv:2106.08254)."""
    if match := _BLOCK.match(name):
        return int(match[1]) + 1
    return 0 if name.startswith(_STEM) else depth + 1


def parameter_groups(model: nn.Module, config: ScheduledOptimizerConfig, depth: int) -> list[dict]:
    """Every trainable parameter in exactly one group, with the group's `weight_decay` and `learning_rate_scale`.

    Steps of LAMB and LARS follow the norms of matrices alone (You et al., arXiv:1708.03888; MoCo v3's LARS).

    A model may say by `optimizer_factors(name)` what is multiplied in for a parameter. That is also how a method with
    two optimizers is trained by one: none of ours but LAMB and LARS looks beyond the number that it updates, so groups
    with factors are the same as optimizers of their own, with the same betas; the norm that is clipped is of both.
    With a `depth` of 0 the layers are those into which timm groups the network, and what timm does not decay is not.
    """
    factors_of = getattr(model, "optimizer_factors", lambda name: Factors())
    layers: dict[str, int] = {}
    undecayed: set[str] = set()
    groups: dict[tuple[float, float], dict] = {}
    if not depth:  # a network whose config does not say it
        layers = {f"encoder.{name}": layer for name, layer in layers_of(model.encoder).items()}
        depth = max(layers.values()) - 1
        without = getattr(model.encoder, "no_weight_decay", set)()
        undecayed = {f"encoder.{name}" for name in without}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factors = factors_of(name)
        layer = layers.get(name, depth + 1) if layers else layer_of(name, depth)
        scale = config.layer_decay ** (depth + 1 - layer) * factors.learning_rate
        decay = float(decays(name, parameter) and name not in undecayed)
        if factors.weight_decay is not None:
            decay = factors.weight_decay
        group = groups.setdefault(
            (decay, scale),
            {
                "params": [],
                "weight_decay": config.weight_decay * decay,
                "learning_rate_scale": scale,
                "always_adapt": decay > 0,  # LAMB and LARS of timm: else a decay of 0 turns them into Adam and momentum
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The rate is set before every step; see `schedule`. Clipping is the engine's alone.

    AdamW and SGD are fused, on processors too: one pass over memory, without the temporaries of `foreach`.
    """
    match config:
        case AdamWConfig():
            return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        case SGDConfig():
            return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
        case LambConfig():
            return Lamb(groups, lr=0.0, betas=config.betas, eps=config.eps, max_grad_norm=None)
        case LarsConfig():
            return Lars(groups, lr=0.0, momentum=config.momentum, trust_coeff=config.trust_coefficient)
        case _:
            assert_never(config)
