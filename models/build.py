"""From configs to modules: the only place where a `kind` becomes a class."""

from typing import assert_never

import torch
from torch import nn

from models.config import EncoderConfig
from models.encoder import build_encoder
from models.objective_config import (
    CapiConfig,
    DistillConfig,
    MaskedAutoencoderConfig,
    ObjectiveConfig,
    SupervisedConfig,
)
from models.objectives.capi import Capi
from models.objectives.distill import Distillation
from models.objectives.mae import MaskedAutoencoder
from models.objectives.supervised import SupervisedObjective
from models.teacher import Teacher


def build_objective(
    objective: ObjectiveConfig, encoder: EncoderConfig, *, num_classes: int, seed: int, teacher: Teacher | None = None
) -> nn.Module:
    """The module that maps a batch to a loss, freshly initialised from `seed`: equal on every rank.

    It holds the encoder as `.encoder`; everything else in it is thrown away after pretraining. `teacher` is what a
    distillation learns from, and what says its classes where no labels are read.
    """
    torch.manual_seed(seed)
    match objective:
        case SupervisedConfig():
            return SupervisedObjective(objective, build_encoder(encoder, num_classes), seed)
        case MaskedAutoencoderConfig():
            return MaskedAutoencoder(objective, build_encoder(encoder), seed)
        case CapiConfig():
            return Capi(objective, build_encoder(encoder), seed)
        case DistillConfig():
            head = num_classes if objective.reads_labels else teacher.num_classes
            return Distillation(objective, build_encoder(encoder, head), teacher, seed)
        case _:
            assert_never(objective)


def checkpoint_activations(module: nn.Module) -> None:
    """Keep only the inputs of the blocks for backward, in encoder and decoder, and compute the rest again there."""
    for part in module.children():
        if hasattr(part, "set_grad_checkpointing"):  # a head has no blocks
            part.set_grad_checkpointing(True)
