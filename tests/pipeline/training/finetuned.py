"""A small model in timm's layout, and fine-tunings of it."""

from pathlib import Path

import torch

from flows.requests.training import training_run
from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder
from pipeline.registry.export import export_timm_directory
from pipeline.registry.locate import ModelSource
from pipeline.run_directory import RunDirectory

SMALL = {"name": "vit_ti16", "image_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}


def exported(directory, classes: tuple[str, ...], **encoder) -> str:
    """A plain ViT with a head, in timm's layout."""
    torch.manual_seed(0)
    config = EncoderConfig(**SMALL | encoder)
    source = ModelSource(
        "x", "checkpoint", "x", encoder=config.model_dump(), num_classes=len(classes), classes=classes,
        mean=(0.5,) * config.channels, std=(0.25,) * config.channels, evaluation_crop=1.0, objective="supervised",
    )  # fmt: skip
    export_timm_directory(build_encoder(config, len(classes)), source, directory, {})
    return str(directory)


def fine_tuning(folder: Path, data: Path, model: str, *settings: str, recipe: str = "finetune_vit") -> RunDirectory:
    """Three steps of six images, prepared as a person would and not yet trained."""
    return training_run(
        "finetune", recipe, data=str(data), profile="local", model=model,
        overrides=["steps=3", "global_batch_size=6", "micro_batch_size=6", "profile.ranks_per_node=1", *settings],
        run_dir=str(folder), home=folder.parent,
    )  # fmt: skip
