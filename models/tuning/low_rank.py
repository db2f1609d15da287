"""LoRA and AdaLoRA by peft's layers, in place of an encoder's dense layers; and their weights merged into plain ones.

peft calls a layer's own weight `LAYER.base_layer.weight`, and what it adds `LAYER.lora_A.default.weight` and so on.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from models.tuning.config import AdaLoRATuning, LoRATuning

_TARGETS = {"qkv": r"attn\.qkv", "proj": r"attn\.proj", "fc1": r"mlp\.fc1", "fc2": r"mlp\.fc2"}
_OWN = ".base_layer."
_ADDED = re.compile(r"\.(lora_[ABE]|ranknum)\.default(\.weight)?$")


def place_low_rank(encoder: nn.Module, config: LoRATuning | AdaLoRATuning) -> None:
    """Into every block of a plain ViT, adding nothing in the beginning. From torch's global generator."""
    from peft import AdaLoraConfig, LoraConfig, inject_adapter_in_model  # two seconds, of those who need it

    said = {
        "target_modules": rf"blocks\.\d+\.({'|'.join(_TARGETS[target] for target in config.targets)})",
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
    }
    if isinstance(config, LoRATuning):
        inject_adapter_in_model(LoraConfig(r=config.rank, **said), encoder)
    else:  # of the numbers that say when ranks fall peft needs some; ours are those of `ranks`
        own = AdaLoraConfig(init_r=config.initial_rank, target_r=config.rank, total_step=2, tinit=0, tfinal=0, **said)
        inject_adapter_in_model(own, encoder)
    for block in encoder.blocks:
        if hasattr(block.attn, "qkv_bias_separate"):  # else timm's Eva multiplies by the weight without calling qkv
            block.attn.qkv_bias_separate = True


def added(layer: Mapping[str, Tensor], config: LoRATuning | AdaLoRATuning) -> Tensor:
    """(out, in): what peft's tensors of one dense layer, by their short names, add to its weight."""
    if isinstance(config, LoRATuning):
        return layer["lora_B"] @ layer["lora_A"] * (config.alpha / config.rank)
    return layer["lora_B"] @ (layer["lora_A"] * layer["lora_E"]) * config.alpha / (layer["ranknum"] + 1e-5)


def merged(weights: Mapping[str, Tensor], config: LoRATuning | AdaLoRATuning) -> dict[str, Tensor]:
    """The tensors of a network with peft's layers as those of the plain network that computes the same."""
    layers: dict[str, dict[str, Tensor]] = {}
    plain = {}
    for name, tensor in weights.items():
        if match := _ADDED.search(name):
            layers.setdefault(name[: match.start()], {})[match[1]] = tensor
        elif not name.startswith("ranks."):  # what `RankAllocation` remembers
            plain[name.replace(_OWN, ".")] = tensor
    for name, layer in layers.items():
        plain[f"{name}.weight"] = plain[f"{name}.weight"] + added(layer, config)
    return plain
