"""The config of a study: which networks learn by which objectives from how much of a dataset, and how it is scored."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from models.encoders.timm_config import PREFIX, AnyEncoderConfig, encoder_of_timm
from models.schema import Config, CountOrZero, Positive, Share, Text
from pipeline.config.problems import NAME_PATTERN
from pipeline.config.protocols import NEEDS
from pipeline.config.recipe import RECIPES, read_yaml
from pipeline.config.training import LENGTH_UNITS
from pipeline.errors import InputError, near_matches

STUDIES = RECIPES / "studies"
OWN_KEYS = ("encoder", "seed", "data", "data.label_fraction", "data.sources")  # what a cell itself says
PROFILE = "profile."
OWN_HEAD = "classify-v1"  # by which what a recipe fine-tuned is scored
SCORED_BY = (  # protocols that end in one top-1 with an interval
    OWN_HEAD, "knn-20-v1", "linear-cached-v1", "linear-mae-v1", "attentive-v1", "finetune-transfer-v1", "vtab1k-v1",
)  # fmt: skip
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


def _dotted(raw: Any) -> Any:
    """{optimizer: {warmup: 3}} as {optimizer.warmup: 3}: set beside what a recipe says, never instead."""
    if not isinstance(raw, dict):
        return raw
    flat = {}
    for key, value in raw.items():
        inner = _dotted(value) if isinstance(value, dict) and value else None
        flat |= {f"{key}.{name}": one for name, one in inner.items()} if inner else {key: value}
    return flat


Settings = Annotated[dict[Text, Any], BeforeValidator(_dotted)]


class StudyNetwork(Config):
    """One network of a study. `timm:NAME` alone stands for {encoder: {name: timm:NAME}}."""

    encoder: AnyEncoderConfig
    """The encoder, all of it: the recipes' own is not looked at."""
    set: Settings = {}
    """Settings of this network's runs by their dotted keys, for example its own optimizer.learning_rate."""

    @model_validator(mode="before")
    @classmethod
    def _by_its_name(cls, raw: Any) -> Any:
        if not isinstance(raw, str):
            return raw
        named = encoder_of_timm(raw.removeprefix(PREFIX)) if raw.startswith(PREFIX) else {"name": raw}
        return {"encoder": named}


class StudyObjective(Config):
    """What a network learns from. A recipe's name alone stands for {recipe: NAME}."""

    recipe: Text
    """The pretraining recipe: objective, optimizer, augmentation, length."""
    set: Settings = {}
    """Settings of this objective's runs by their dotted keys."""

    @model_validator(mode="before")
    @classmethod
    def _by_its_name(cls, raw: Any) -> Any:
        return {"recipe": raw} if isinstance(raw, str) else raw


class Downstream(Config):
    """How a pretrained network is scored: by a protocol, or fine-tuned by a recipe and scored by its new head."""

    data: Text | None = None
    """The dataset directory that it is scored on, absolute. null: the one that it was pretrained on."""
    protocol: Text | None = None
    """A protocol of `vit evaluate`, for example linear-cached-v1, which it is where nothing is said."""
    recipe: Text | None = None
    """A fine-tuning recipe instead of a protocol; each cell then is a second run."""
    set: Settings = {}
    """Settings of that recipe by their dotted keys."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "Downstream":
        if self.protocol is not None and self.recipe is not None:
            raise ValueError(f"protocol {self.protocol} and recipe {self.recipe}: say one, what is fine-tuned by a "
                             f"recipe is scored by {OWN_HEAD}")  # fmt: skip
        if self.set and self.recipe is None:
            raise ValueError("set: settings are those of a fine-tuning recipe, and there is none; say recipe, or leave "
                             "set out")  # fmt: skip
        if self.protocol is not None and self.protocol not in SCORED_BY:
            raise ValueError(f"protocol `{self.protocol}` ends in no top-1 or does not exist; "
                             f"{near_matches(self.protocol, SCORED_BY)}")  # fmt: skip
        return self

    @property
    def scored_by(self) -> str:
        """The protocol behind the scores in the table."""
        return OWN_HEAD if self.recipe else self.protocol or "linear-cached-v1"

    @property
    def needs_head(self) -> bool:
        """Whether the pretrained network itself must say the classes."""
        return self.recipe is None and NEEDS[self.scored_by].head


class StudyConfig(Config):
    """A grid over networks, objectives, fractions of a dataset and seeds: `vit study FILE`."""

    name: Name
    """What its table is called; the name of FILE where it is left out."""
    data: Text
    """The dataset directory to pretrain on, absolute; or by hand: --set data=DATASET."""
    fractions: Annotated[tuple[Share, ...], Field(min_length=1)]
    """Shares of each class's training samples that are pretrained on; a smaller one lies within a larger one."""
    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    """How long runs are, by the length that recipe and `set` say: [0.1, 1] trains every cell once for a tenth of it and
    once for all. Several make the curve over compute; amounts of data are compared at the longest."""
    networks: Annotated[dict[Name, StudyNetwork], Field(min_length=1)]
    """By their names in the table."""
    objectives: Annotated[dict[Name, StudyObjective], Field(min_length=1)]
    """By their names in the table."""
    seeds: Annotated[tuple[CountOrZero, ...], Field(min_length=1)] = (0,)
    """Of initial weights, order and augmentation: a run of every cell for each. Intervals are over them where there are
    two or more, and over the test images where there is one."""
    downstream: Downstream = Downstream()
    """How every cell is scored."""
    profile: Text = "local"
    """Where the runs go."""
    set: Settings = {}
    """Settings of all runs, of recipe or profile, by their dotted keys; those of an objective come after them, and
    those of a network last."""

    @field_validator("fractions", "lengths", "seeds")
    @classmethod
    def _once_each(cls, values: tuple) -> tuple:
        if len(set(values)) < len(values):
            raise ValueError(f"each value once (got {list(values)})")
        return tuple(sorted(values))

    @model_validator(mode="after")
    def _cells_are_the_studys(self) -> "StudyConfig":
        named = [("set", self.set), *((f"objectives.{name}.set", one.set) for name, one in self.objectives.items()),
                 *((f"networks.{name}.set", one.set) for name, one in self.networks.items())]  # fmt: skip
        for place, settings in named:
            for key in settings:
                if key in OWN_KEYS or key.startswith("encoder."):
                    raise ValueError(f"{place}: {key} is what cells differ in; say it by fractions, networks or seeds")
                if key in LENGTH_UNITS and place.startswith("networks") and len(self.networks) > 1:
                    raise ValueError(f"{place}: {key}: networks are compared after as many images; say it in `set`")
                if key.startswith(PROFILE) and place != "set":
                    raise ValueError(f"{place}: {key}: all runs go to one profile; say it in `set` of the study")
        return self


def study_path(file: str) -> Path:
    """The file of a shipped study's name, or of a path that ends in .yaml."""
    path = Path(file).expanduser() if file.endswith((".yaml", ".yml")) else STUDIES / f"{file}.yaml"
    if not path.is_file():
        if Path(file).expanduser().exists():
            raise InputError(f"study `{file}`: a study is a file whose name ends in .yaml")
        shipped = [one.stem for one in STUDIES.glob("*.yaml")]
        raise InputError(f"study `{file}` does not exist; {near_matches(file, shipped)}")
    return path


def read_study(path: Path) -> dict[str, Any]:
    """The keys of a study's file, its name filled in."""
    return {"name": path.stem} | read_yaml(path)
