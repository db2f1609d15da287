"""Configs of the stages that do not train, and the config file of a run directory."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from models.schema import Config, Fraction, Size, Text
from pipeline.config.embed import EmbedConfig
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.export import ExportConfig
from pipeline.config.recipe import read_yaml, validate
from pipeline.config.training import FinetuneConfig, PretrainConfig
from pipeline.errors import InputError


class RegisterConfig(Config):
    """Registration of a trained model in MLflow."""

    stage: Literal["register"] = "register"
    model: Text
    """The MODEL, a run or checkpoint directory."""
    name: Text
    """Registered model name: letters, digits, dots, dashes, underscores."""
    tracking_uri: Text
    """The MLflow tracking store."""
    evaluations: tuple[Text, ...] = ()
    """Run directories of evaluations of this model, newest first; the first protocol of the newest that the champion
    was scored by on the same data, too, decides who is champion."""
    promotion_margin: Fraction = 0.005
    """How much better than the champion's top-1 (or mean average precision, or mean IoU), on the same data and
    protocol, a version must be to replace it where the two have no predictions of the same images. Where they have, an
    exact McNemar test decides (p < 0.05)."""
    licence: Text | None = None
    """The licence of the weights, for the model card. null: the dataset's, where its index names one."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError(f"expected a letter or digit, then those, dots, dashes and underscores (got {name!r})")
        return name


class InspectConfig(Config):
    """Pictures of what a model learned."""

    stage: Literal["inspect"] = "inspect"
    model: Text
    """The MODEL."""
    source: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Where images come from: a dataset directory, or folders, globs and files; absolute."""
    destination: Text
    """The folder that the pictures and index.html are written to, absolute."""
    tracking_uri: Text
    """The MLflow tracking store, where the model's own run gets the pictures too."""
    images: Size = 8
    """How many images are looked at, spread evenly over all there are."""
    split: Text | None = None
    """The split of a dataset; null: one that was not trained on, where there is one."""
    mask: Text | None = None
    """An image that is stretched over each: what it covers in white, a masked autoencoder fills in; null: none."""


class SequenceConfig(Config):
    """Several training runs, one after the other, in one set of processes: start-up is paid once."""

    stage: Literal["sequence"] = "sequence"
    runs: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Run directories, absolute, in order."""


StageConfig = (
    PretrainConfig | FinetuneConfig | EvaluateConfig | RegisterConfig | InspectConfig | EmbedConfig | ExportConfig
    | SequenceConfig
)  # fmt: skip
STAGES: dict[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "register": RegisterConfig,
    "inspect": InspectConfig,
    "embed": EmbedConfig,
    "export": ExportConfig,
    "sequence": SequenceConfig,
}


def read_run_config(run_directory: Path) -> StageConfig:
    """The resolved config of a run directory."""
    path = Path(run_directory) / "config.yaml"
    if not path.is_file():
        raise InputError(f"{run_directory}: not a run directory: it has no config.yaml")
    raw = read_yaml(path)
    stage = raw.get("stage")
    if stage not in STAGES:
        raise InputError(f"{path}: stage: {stage!r} is none of {', '.join(STAGES)}")
    return validate(STAGES[stage], raw, str(path))
