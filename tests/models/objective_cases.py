"""Every objective, small, and what theory says of it. A new objective is added to CASES and gets all common proofs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder
from models.masked.decoder_config import DecoderConfig
from models.objectives.batch import Batch
from models.objectives.config import (
    CapiConfig,
    DistillConfig,
    MaskedAutoencoderConfig,
    ObjectiveConfig,
    PatchColourConfig,
    SimMIMConfig,
    SupervisedConfig,
)
from models.objectives.teacher import Teacher

SMALL = {"name": "vit_ti16", "image_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
TINY_DECODER = DecoderConfig(embed_dim=32, depth=1, num_heads=2)
CLASSES = 7
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)


class Case(NamedTuple):
    config: ObjectiveConfig
    first_loss: Callable[[nn.Module, Batch], float]  # what theory says of the first batch
    tolerance: float = 1e-5  # of the first loss, relative
    hidden: Callable[[nn.Module, Tensor], Tensor] | None = None  # (B, N) bool of positions: patches never to be seen
    splits: bool = True  # whether a batch gives what its parts give
    keys: str = ""  # what is set beside the kind, to tell cases apart

    @property
    def name(self) -> str:
        return f"{self.config.kind} {self.keys}".strip()


def _hidden_from_mae(module: nn.Module, positions: Tensor) -> Tensor:
    return module.mask(positions).masked


def _first_mae_loss(module: nn.Module, batch: Batch) -> float:
    """Targets of variance 1, and what Xavier's uniform weights make of normalised tokens: 2 in / (in + out)."""
    inputs, outputs = module.decoder.predict.in_features, module.decoder.predict.out_features
    return 1 + 2 * inputs / (inputs + outputs)


def _first_sigmoid_loss(module: nn.Module, batch: Batch) -> float:
    """One class right, which the bias calls unlikely, and the others that it is right about."""
    bias = module.config.head_bias
    return math.log(1 + math.exp(-bias)) + (CLASSES - 1) * math.log(1 + math.exp(bias))


def _first_capi_loss(module: nn.Module, batch: Batch) -> float:
    """Of 32 clusters, twice: the predictions know nothing yet, nor does the clustering."""
    return 2 * math.log(module.config.num_prototypes)


CASES = [
    Case(SupervisedConfig(), lambda module, batch: math.log(CLASSES)),
    Case(SupervisedConfig(label_smoothing=0.1), lambda module, batch: math.log(CLASSES), keys="smoothed"),
    Case(SupervisedConfig(loss="sigmoid", head_bias=-2.0), _first_sigmoid_loss, keys="sigmoid"),
    Case(
        MaskedAutoencoderConfig(decoder=TINY_DECODER),
        _first_mae_loss, tolerance=0.1, hidden=_hidden_from_mae,
    ),
    Case(
        MaskedAutoencoderConfig(decoder=TINY_DECODER, sampling="blocks", mask_ratio=0.5),
        _first_mae_loss, tolerance=0.1, hidden=_hidden_from_mae, keys="blocks",
    ),
    Case(PatchColourConfig(), lambda module, batch: math.log(512)),
    Case(PatchColourConfig(target="colours_4x4"), lambda module, batch: math.log(512), keys="colours_4x4"),
    Case(PatchColourConfig(target="pixels"), lambda module, batch: 1.0, tolerance=0.03, keys="pixels"),
    Case(
        SimMIMConfig(mask_size=8), lambda module, batch: math.sqrt(2 / math.pi),  # of normal noise
        tolerance=0.02, hidden=lambda module, positions: module.mask(positions),
    ),
    Case(
        CapiConfig(num_prototypes=32, predictor_depth=2), _first_capi_loss,
        tolerance=0.25, hidden=lambda module, positions: module.mask(positions)[0].masked, splits=False,
    ),
    Case(
        DistillConfig(teacher="timm:any", teacher_encoder=EncoderConfig(**SMALL), teacher_classes=CLASSES),
        lambda module, batch: math.log(CLASSES),
    ),
]  # fmt: skip
IDS = [case.name for case in CASES]


def teacher_of(config: ObjectiveConfig) -> Teacher | None:
    """An untrained one, where there must be one."""
    if not isinstance(config, DistillConfig):
        return None
    torch.manual_seed(3)
    network = build_encoder(EncoderConfig(**SMALL), CLASSES)
    nn.init.normal_(network.head.weight, std=0.5)
    return Teacher(network, CLASSES, (16, 16), mean=MEAN, std=STD, student_mean=MEAN, student_std=STD)


def build(config: ObjectiveConfig, encoder: EncoderConfig | None = None, num_classes: int = CLASSES, **options: object):
    """The module for `encoder`, or for a small one with `options`."""
    encoder = encoder or EncoderConfig(**SMALL | options)
    return build_objective(
        config, encoder, num_classes=num_classes, seed=0, mean=MEAN, std=STD, teacher=teacher_of(config)
    )  # fmt: skip


def batch_of(count: int, first: int = 0, size: tuple[int, int] = (16, 16)) -> Batch:
    """Normalised noise, labels of all classes, and the positions from `first` on."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, *size, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Batch(images, labels, torch.arange(first, first + count))


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(*(None if part is None else part[start:stop] for part in batch))


def shake(module: nn.Module) -> nn.Module:
    """The module with every trained weight drawn anew: a head at zero passes no gradient on."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return module
