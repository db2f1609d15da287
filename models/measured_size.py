"""How large an objective's module is with a network of timm, which only the built one knows.

`python -m models.measured_size` reads both configs as JSON and prints the size as JSON, for those who must not load
torch.
"""

import json
import sys
import warnings

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_objective
from models.encoders.timm_config import TimmEncoderConfig
from models.objectives.batch import Batch
from models.objectives.config import ObjectiveConfig
from models.schema import Config


class Measured(Config):
    """What is measured."""

    encoder: TimmEncoderConfig
    """The network."""
    objective: ObjectiveConfig
    """What it learns from."""


def measured_size(encoder: TimmEncoderConfig, objective: ObjectiveConfig) -> dict[str, float]:
    """Parameters, floating-point operations of a training image (forward and backward) and numbers kept for backward
    per image; of parameters and operations, also how many more a class adds."""
    one, two = (_size_with_classes(encoder, objective, count) for count in (1, 2))
    return {
        "parameters": 2 * one[0] - two[0], "parameters_per_class": two[0] - one[0],
        "flops": 2 * one[1] - two[1], "flops_per_class": two[1] - one[1], "kept": one[2],
    }  # fmt: skip


def _size_with_classes(
    encoder: TimmEncoderConfig, objective: ObjectiveConfig, num_classes: int
) -> tuple[int, float, int]:
    """(parameters, operations, numbers kept) on the meta device, where nothing is computed."""
    batch = 2  # a BatchNorm over a single number has no variance
    module = build_objective(objective, encoder, num_classes=num_classes, seed=0).to("meta").train()
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor.numel()
            alive.append(storage)
        return tensor

    alive: list = []
    images = torch.randn(batch, encoder.channels, *encoder.input_size, device="meta")
    numbers = torch.arange(batch, device="meta")
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outcome = module(Batch(images, numbers, numbers))
        outcome.loss.backward()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters, counter.get_total_flops() / batch, sum(kept.values()) // batch


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        asked = Measured.model_validate_json(sys.stdin.read())
        size = measured_size(asked.encoder, asked.objective)
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    sys.stdout.write(json.dumps(size) + "\n")
