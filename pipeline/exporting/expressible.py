"""Which models a format can express, and what it takes to write one: said before anything runs. Torch-free."""

import importlib.util

from models.encoders.config import TABLES, EncoderConfig
from models.encoders.timm_config import read_encoder
from pipeline.config.export import ExportConfig
from pipeline.registry.locate import ModelSource, unregistrable

NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "int8": ("onnx", "onnxscript", "onnxruntime")}
INSTEAD = {"safetensors": "onnx or pt2", "hf": "safetensors, onnx or pt2"}


def missing_packages(format: str) -> list[str]:
    """The packages that a format needs and this environment has not."""
    return [name for name in NEEDS.get(format, ()) if importlib.util.find_spec(name) is None]


def inexpressible_export(source: ModelSource, config: ExportConfig) -> str | None:
    """Why a located model cannot be written so, and what can; None where it can."""
    reason = None
    if config.format == "safetensors":
        reason = unregistrable(source)
    elif config.format == "hf":
        reason = not_of_transformers(source)
    if reason:
        return f"format {config.format} cannot express it: {reason}; take {INSTEAD[config.format]}"
    if config.token_reduction is None:
        return None
    encoder = read_encoder(source.encoder)
    tied = not isinstance(encoder, EncoderConfig) or encoder.positions not in (*TABLES, "none")
    if tied or source.tuning is not None or source.head is not None:
        return (
            "token_reduction: tokens are merged in plain ViTs with positions "
            f"{', '.join(TABLES)} or none, a linear head or none, and no adapters or prompts; leave it out"
        )
    return None


def instead_of_tracing(source: ModelSource, config: ExportConfig) -> str:
    """What to do where torch's exporters cannot follow a network."""
    if config.token_reduction is not None:
        return "leave token_reduction out"
    weights = [("safetensors", unregistrable), ("hf", not_of_transformers)]
    others = [format for format, reason in weights if reason(source) is None]
    others += ["pt2"] if config.format in NEEDS else []
    return f"take {' or '.join(others)}" if others else "no other format can express it either"


def transformers_word(encoder: EncoderConfig) -> str:
    """transformers' model_type of the same network: `vit`, or `beit` where the head reads the mean of the patches, or
    branches have factors, which its ViT has not and its BEiT (without relative positions) has."""
    return "vit" if encoder.pooling == "token" and encoder.layer_scale is None else "beit"


def not_of_transformers(source: ModelSource) -> str | None:
    """Why transformers has no network like this one; None where it has."""
    encoder = read_encoder(source.encoder)
    if not isinstance(encoder, EncoderConfig):
        return f"its network is {encoder.name}, and only plain ViTs become transformers'"
    if source.tuning is not None:
        return f"transformers' ViT has no place for what tuning.kind {source.tuning['kind']} added"
    if source.head is not None:
        return f"transformers' ViT has a linear head or none, and this one is {source.head['kind']}"
    for key, differs, words in (
        ("class_token", not encoder.class_token, "transformers' ViT and BEiT have one"),
        ("register_tokens", encoder.register_tokens > 0, "transformers' ViT and BEiT have none"),
        ("distillation_token", encoder.distillation_token, "transformers' ViT and BEiT have none"),
        ("positions", encoder.positions not in (*TABLES, "none"), "theirs are a table, added to the patches"),
        ("representation", encoder.representation, "they have no such layer before a head"),
    ):
        if differs:
            return f"encoder.{key} is {getattr(encoder, key)}, and {words}"
    height, width = encoder.input_size
    if transformers_word(encoder) == "beit" and height != width:
        return f"encoder.image_size is {height} x {width}, and transformers' BEiT (which has the mean) takes squares"
    return None
