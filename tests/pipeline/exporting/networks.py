"""Small networks of every kind that exports meet, with weights that say something."""

import torch
from torch import nn

from models.build import build_network
from models.encoders.head_config import read_head
from models.encoders.timm_config import read_encoder
from pipeline.registry.locate import ModelSource

SMALL = {
    "name": "vit_ti16", "image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
}  # fmt: skip
CLASSES = ("ant", "bee", "cat", "dog", "eel")


def source_of(encoder: dict, *, head: bool = True, **facts) -> ModelSource:
    config = read_encoder(encoder)
    channels = config.channels
    return ModelSource(
        "a model", "checkpoint", "nowhere", encoder=config.model_dump(), num_classes=len(CLASSES) if head else 0,
        classes=CLASSES if head else (), mean=(0.4, 0.5, 0.45, 0.5)[:channels], std=(0.2, 0.25, 0.3, 0.2)[:channels],
        evaluation_crop=0.875, objective="supervised" if head else "mae", **facts,
    )  # fmt: skip


def network_of(source: ModelSource, seed: int = 0) -> nn.Module:
    """The network with no tensor at zero or one: what an export leaves out, or puts elsewhere, changes its outputs."""
    torch.manual_seed(seed)
    network = build_network(read_encoder(source.encoder), source.num_classes, read_head(source.head)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim > 1 else 0.3)
    return network
