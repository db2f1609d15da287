"""Tiny plain ViTs, one for each option, on images that are not square."""

import torch
from timm.models.vision_transformer import VisionTransformer

from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder

SMALL = {"name": "vit_ti16", "image_size": [16, 24], "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
OPTIONS = [
    {"positions": "none", "norm_eps": 1e-5},
    {"positions": "learned", "class_token": False, "pooling": "mean"},
    {"positions": "learned2d", "layer_scale": 0.1},
    {"positions": "sinusoidal1d", "activation": "gelu_tanh", "register_tokens": 2},
    {"positions": "sincos2d", "qkv_bias": False, "norm_eps": 1e-5, "register_tokens": 1, "pooling": "mean"},
    {"positions": "relative", "layer_scale": 0.1},
    {"positions": "relative_shared", "class_token": False, "pooling": "mean"},
    {"positions": "relative_shared", "qkv_bias": False},
    {"positions": "rotary", "register_tokens": 2, "layer_scale": 0.1},
    {"positions": "rotary", "class_token": False, "pooling": "mean", "qkv_bias": False},
    {"representation": True, "norm_eps": 1e-12},
]


def encoder_of(options: dict, num_classes: int = 0) -> VisionTransformer:
    """In evaluation mode, with every parameter away from its initial zero, one or small number."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(**SMALL | options), num_classes).eval()
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad and parameter.ndim < 3:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)
    return encoder


def images_of(config: EncoderConfig, count: int = 2) -> torch.Tensor:
    return torch.randn(count, config.channels, *config.input_size, generator=torch.Generator().manual_seed(1))
