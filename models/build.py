"""From configs to modules: the only place where a `kind` becomes a class."""

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import nn

from models.encoders.config import EncoderConfig
from models.encoders.head_config import HeadConfig, LinearHeadConfig
from models.encoders.heads import place_head
from models.encoders.timm_config import TimmEncoderConfig
from models.encoders.timm_network import build_timm_network
from models.encoders.vit import build_encoder
from models.objectives.capi import Capi
from models.objectives.config import (
    CapiConfig,
    DistillConfig,
    MaskedAutoencoderConfig,
    ObjectiveConfig,
    PatchColourConfig,
    SimMIMConfig,
    SupervisedConfig,
)
from models.objectives.distill import Distillation
from models.objectives.mae import MaskedAutoencoder
from models.objectives.patch_colour import PatchColour
from models.objectives.simmim import SimMIM
from models.objectives.supervised import SupervisedObjective
from models.objectives.teacher import Teacher

LINEAR = LinearHeadConfig()


def build_network(
    encoder: EncoderConfig | TimmEncoderConfig, num_classes: int = 0, head: HeadConfig = LINEAR
) -> nn.Module:
    """A plain ViT, or any other network of timm, with a head for `num_classes` where there are any."""
    if isinstance(encoder, TimmEncoderConfig):
        return build_timm_network(encoder, num_classes)
    network = build_encoder(encoder, num_classes)
    place_head(network, head, num_classes)
    return network


def build_objective(
    objective: ObjectiveConfig, encoder: EncoderConfig | TimmEncoderConfig, *, num_classes: int, seed: int,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None, teacher: Teacher | None = None,
    label_sets: Sequence[Sequence[int]] | None = None,
) -> nn.Module:  # fmt: skip
    """The module that maps a batch to a loss, freshly initialised from `seed`: equal on every rank.

    It holds the encoder as `.encoder`; everything else in it is thrown away after pretraining. `mean` and `std`, one
    per channel, are what the batch's images were normalised by, for targets made of pixels in 0..1; None: by nothing.
    `teacher` is what a distillation learns from, and what says its classes where no labels are read. `label_sets` are,
    by label, the numbers of the classes that it stands for; None: a label is a class.
    """
    torch.manual_seed(seed)
    match objective:
        case SupervisedConfig():
            network = build_network(encoder, num_classes, objective.head)
            return SupervisedObjective(objective, network, seed, label_sets)
        case MaskedAutoencoderConfig():
            return MaskedAutoencoder(objective, build_encoder(encoder), seed)
        case PatchColourConfig():
            mean, std = mean or (0.0,) * encoder.channels, std or (1.0,) * encoder.channels
            return PatchColour(objective, build_encoder(encoder), seed, mean, std)
        case SimMIMConfig():
            return SimMIM(objective, build_network(encoder), seed)
        case CapiConfig():
            return Capi(objective, build_encoder(encoder), seed)
        case DistillConfig():
            head = num_classes if objective.reads_labels else teacher.num_classes
            return Distillation(objective, build_encoder(encoder, head), teacher, seed)
        case _:
            assert_never(objective)


def checkpoint_activations(module: nn.Module) -> None:
    """Keep only the inputs of the blocks for backward, in encoder and decoder, and compute the rest again there.

    ValueError where timm does not do that for the network.
    """
    for part in module.children():
        if hasattr(part, "set_grad_checkpointing"):  # a head has no blocks
            try:
                part.set_grad_checkpointing(True)
            except AssertionError:
                raise ValueError(f"timm's {type(part).__name__} has no blocks that are computed again") from None
