"""Makes an objective's module train what its tuning says: new parts placed in the encoder, all else of it frozen."""

from typing import assert_never

import torch
from torch import nn

from models.encoders.timm_network import head_names
from models.tuning.adapters import place_adapters
from models.tuning.config import (
    AdaLoRATuning,
    AdapterTuning,
    FullTuning,
    HeadTuning,
    LoRATuning,
    TuningConfig,
    VisualPromptTuning,
)
from models.tuning.low_rank import place_low_rank
from models.tuning.prompts import place_prompts
from models.tuning.ranks import RankAllocation, regularise

_ENCODER = "encoder."
_NEW = (".lora_A.", ".lora_B.", ".lora_E.", ".adapter.", "encoder.prompts.")


def tune(module: nn.Module, config: TuningConfig, seed: int) -> None:
    """Prepare an objective's `module` whose encoder has the weights that it is tuned from.

    What is new draws its first weights from `seed`, equal on every rank, and changes no output yet but for prompts.
    Under adalora the module has `ranks`, which the training loop calls around every update.
    """
    if not config.freezes:
        return
    own = {name for name, one in module.named_parameters() if one.requires_grad}  # before peft freezes the head too
    torch.manual_seed(seed)
    place_parts(module.encoder, config)
    module.coins.place(module.encoder)
    if isinstance(config, AdaLoRATuning):
        module.ranks = RankAllocation(module.encoder, config)
        module.register_forward_hook(regularise)
    _freeze(module, own)


def place_parts(encoder: nn.Module, config: TuningConfig) -> None:
    """The new layers and tokens of a plain ViT, freshly initialised from torch's global generator."""
    match config:
        case FullTuning() | HeadTuning():
            return
        case LoRATuning() | AdaLoRATuning():
            place_low_rank(encoder, config)
        case AdapterTuning():
            place_adapters(encoder, config)
        case VisualPromptTuning():
            place_prompts(encoder, config)
        case _:
            assert_never(config)


def _freeze(module: nn.Module, own: set[str]) -> None:
    """What the encoder came with, but its head: neither a gradient, nor another statistic of BatchNorm.

    `own` are the parameters that train without tuning.
    """
    of_head = {f"{_ENCODER}{name}" for name in head_names(module.encoder)}
    for name, parameter in module.named_parameters():
        beside = name in own and (name in of_head or not name.startswith(_ENCODER))
        parameter.requires_grad_(beside or any(part in name for part in _NEW))
    for name, part in module.encoder.named_modules():
        places = [f"{_ENCODER}{name}.{own}" for own, _ in part.named_buffers(recurse=False)]
        if isinstance(part, nn.modules.batchnorm._NormBase) and not of_head.issuperset(places):
            _keep_statistics(part)


def _keep_statistics(norm: nn.Module) -> None:
    """For good: `train` of what it is a part of would have it follow the batches again."""
    norm.eval()
    norm.train = lambda mode=True: norm
