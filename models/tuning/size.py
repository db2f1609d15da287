"""How many parameters a tuning of a plain ViT adds, and what they cost. Torch-free; tests hold it to built modules."""

from typing import assert_never

from models.encoders.config import EncoderConfig
from models.encoders.size import encoder_macs, encoder_tokens
from models.tuning.config import (
    AdaLoRATuning,
    AdapterTuning,
    FullTuning,
    HeadTuning,
    LoRATuning,
    TuningConfig,
    VisualPromptTuning,
)


def new_parameters(tuning: TuningConfig, encoder: EncoderConfig) -> int:
    """Trained ones that the encoder did not come with."""
    width, depth = encoder.embed_dim, encoder.depth
    match tuning:
        case FullTuning() | HeadTuning():
            return 0
        case LoRATuning():
            return depth * tuning.rank * _sides(tuning, encoder)
        case AdaLoRATuning():
            return depth * tuning.initial_rank * (_sides(tuning, encoder) + len(tuning.targets))
        case AdapterTuning():
            return depth * _adapters(tuning) * ((2 * width + 1) * tuning.width + width)
        case VisualPromptTuning():
            return tuning.tokens * width * (depth if tuning.depth == "deep" else 1)
        case _:
            assert_never(tuning)


def new_constants(tuning: TuningConfig, encoder: EncoderConfig) -> int:
    """Parameters that are added and never trained: peft's count of ranks, of every layer."""
    return encoder.depth * len(tuning.targets) if isinstance(tuning, AdaLoRATuning) else 0


def new_macs(tuning: TuningConfig, encoder: EncoderConfig) -> float:
    """Multiply-adds that they add to one image's forward."""
    tokens = encoder_tokens(encoder) * encoder.depth
    match tuning:
        case FullTuning() | HeadTuning():
            return 0.0
        case LoRATuning() | AdaLoRATuning():
            return float(tokens * tuning.first_rank * _sides(tuning, encoder))
        case AdapterTuning():
            return float(tokens * _adapters(tuning) * 2 * encoder.embed_dim * tuning.width)
        case VisualPromptTuning():
            return encoder_macs(encoder, encoder.num_patches + tuning.tokens) - encoder_macs(encoder)
        case _:
            assert_never(tuning)


def new_tokens(tuning: TuningConfig) -> int:
    """How many more tokens every block computes."""
    return tuning.tokens if isinstance(tuning, VisualPromptTuning) else 0


def _sides(tuning: LoRATuning | AdaLoRATuning, encoder: EncoderConfig) -> int:
    """Inputs and outputs of a block's tuned layers."""
    width, hidden = encoder.embed_dim, encoder.mlp_dim
    sides = {"qkv": 4 * width, "proj": 2 * width, "fc1": width + hidden, "fc2": width + hidden}
    return sum(sides[target] for target in tuning.targets)


def _adapters(tuning: AdapterTuning) -> int:
    """Of a block."""
    return 1 if tuning.placement == "parallel" else 2
