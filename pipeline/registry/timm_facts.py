"""What timm says of the images that `timm:NAME` was learned from, asked once of a process that may load torch.

Itself torch-free."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

from models.encoders.timm_config import PREFIX, read_encoder
from pipeline.errors import InputError
from pipeline.registry.locate import ModelSource


def with_timm_facts(source: ModelSource) -> ModelSource:
    """A located `timm:NAME` with mean, deviation and crop of its weights' images; any other model as it is."""
    if source.kind != "timm":
        return source
    facts = _asked(source.path)
    if not facts:
        return source
    return replace(
        source, mean=tuple(facts["mean"]), std=tuple(facts["std"]), evaluation_crop=facts["crop_pct"],
        evaluation_crop_mode=facts["crop_mode"],
    )  # fmt: skip


def described_by_timm(source: ModelSource) -> ModelSource:
    """A located `timm:NAME` as a network of its own with its head, as timm evaluates it; any other model as it is."""
    if source.kind != "timm" or not (facts := _asked(source.path)):
        return source
    channels, *size = facts["input_size"]
    encoder = read_encoder({"name": PREFIX + source.path, "image_size": tuple(size), "channels": channels})
    return replace(with_timm_facts(source), encoder=encoder.model_dump(), num_classes=facts["num_classes"])


@lru_cache
def _asked(name: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "models.pretrained_facts", name], capture_output=True, text=True, check=False
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no word"])[-1]
        raise InputError(f"MODEL `timm:{name}`: {last.removeprefix('error: ')}")
    return json.loads(process.stdout.splitlines()[-1])
