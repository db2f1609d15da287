"""The configs of an evaluation and of a suite: which models are scored, on what, under which protocols."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from models.schema import Config, Count, CountOrZero, Size, Text
from pipeline.config.protocols import Protocol

Name = Annotated[str, Field(min_length=1, pattern=r"^[^/]+$")]  # `/` parts the name of a metric
Protocols = Annotated[tuple[Protocol, ...], Field(min_length=1)]


class ScoredDataset(Config):
    """One dataset of an evaluation, as it was found."""

    path: Text
    """The dataset directory, absolute."""
    protocols: Protocols
    """What is measured on it; see pipeline/config/protocols."""
    group: Name | None = None
    """Datasets of one group are averaged in the table too, as VTAB's natural, specialised and structured ones."""


class EvaluateConfig(Config):
    """Evaluation of models on datasets under named protocols."""

    stage: Literal["evaluate"] = "evaluate"
    models: Annotated[dict[Text, Text], Field(min_length=1)]
    """MODELs by the name they get in the table."""
    datasets: Annotated[dict[Name, ScoredDataset], Field(min_length=1)]
    """Datasets by the name they get in the metrics."""
    trained: dict[Text, dict[Text, dict[Text, Text]]] = {}
    """Runs that protocols trained: by model, dataset and protocol. Filled in by the command."""
    unavailable: dict[Text, Text] = {}
    """Datasets of a suite that could not be read, and why. Filled in by the command."""
    splits: Annotated[tuple[Literal["train", "validation", "test"], ...], Field(min_length=1)] = ("validation", "test")
    """Which splits are scored, of those that a dataset has. Scores of `test` go by the dataset's name, those of another
    split by `DATASET.SPLIT`. Probes learn from `train`; what chooses a model should be validation."""
    batch_size: Size = 64
    """Images per rank per forward."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network on an accelerator; bf16 is quicker and moves a decision in a thousand."""
    reuse_features: bool = True
    """Keep features in the home and read them again for the same weights, images and preprocessing."""
    bootstrap_samples: Count = 1000
    """Redrawings of the samples behind the 95 % intervals."""
    worst_images: CountOrZero = 16
    """How many of the images that are most confidently mistaken are listed and drawn; 0: none."""

    @model_validator(mode="before")
    @classmethod
    def _of_one_dataset(cls, raw: Any) -> Any:
        """Evaluations of before suites named a single dataset at the top."""
        if not isinstance(raw, dict) or "datasets" in raw or not {"data", "dataset", "protocols"} <= raw.keys():
            return raw
        rest = {key: value for key, value in raw.items() if key not in ("data", "dataset", "protocols", "split")}
        split = {"splits": [raw["split"]]} if "split" in raw else {}
        return rest | split | {"datasets": {raw["dataset"]: {"path": raw["data"], "protocols": raw["protocols"]}}}


class SuiteDataset(Config):
    """A dataset of a suite."""

    data: Text
    """The dataset directory, or its URL."""
    protocols: tuple[Text, ...] = ()
    """What is measured on it; left out: the suite's."""
    group: Name | None = None
    """The group whose mean it counts towards."""


class SuiteConfig(Config):
    """A file of datasets and protocols that models are held to: `vit evaluate MODEL --suite FILE`."""

    datasets: Annotated[dict[Name, SuiteDataset], Field(min_length=1)]
    """By the name they get in the metrics."""
    protocols: Annotated[tuple[Text, ...], Field(min_length=1)]
    """What is measured on every dataset that does not say."""
    models: dict[Text, Text] = {}
    """MODELs that are scored beside the command's, by their names in the table, for example `random:RUN`."""
    settings: dict[Text, Any] = {}
    """Settings of the evaluation by their dotted keys, as `--set` gives them."""
    training: dict[Text, dict[Text, Any]] = {}
    """Settings of the recipes that protocols train, by protocol. Other than the protocol's own, they make another
    protocol: the name of its metrics ends in `+` and the settings."""
