"""From the rows of a split to the scores of one protocol: the only place where a protocol's name becomes a function."""

from collections.abc import Callable, Sequence
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.evaluation import EvaluateConfig
from pipeline.errors import InputError
from pipeline.evaluation.calibration import calibration_scores
from pipeline.evaluation.features import SplitFeatures
from pipeline.evaluation.frozen.few_shot import few_shot_scores
from pipeline.evaluation.frozen.knn import knn_scores
from pipeline.evaluation.frozen.linear import linear_scores
from pipeline.evaluation.frozen.retrieval import retrieval_values
from pipeline.evaluation.multilabel import multilabel_scores, targets_of
from pipeline.evaluation.scores import Scored, classified, mean_of
from pipeline.registry.locate import ModelSource, unknown_classes
from pipeline.shards.index import DatasetIndex

Probe = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # train features and labels, features, classes: (S, V) scores


def scored_by_head(
    protocol: str, source: ModelSource, rows: SplitFeatures, index: DatasetIndex, config: EvaluateConfig,
    selection: SplitFeatures | None,
) -> Scored:  # fmt: skip
    """The scores of a model's own head. `selection`: the rows of the split that a temperature is fitted on."""
    logits = head_of(source, rows, index)
    if source.outputs == "sigmoid" and index.label_sets is None:
        logits = F.logsigmoid(logits)  # of one class an image: the sigmoids, made to add up to 1
    match protocol:
        case "classify-v1" if index.label_sets is not None:
            return Scored(multilabel_scores(logits, targets_of(rows.labels, index.label_matrix())))
        case "classify-v1":
            return classified(logits, rows.labels, bootstrap_samples=config.bootstrap_samples)
        case "calibration-v1":
            fitted_on = (head_of(source, selection, index), selection.labels) if selection else None
            return Scored(calibration_scores(logits, rows.labels, fitted_on))
        case _:
            assert_never(protocol)


def scored_by_features(
    protocol: str, train: SplitFeatures, splits: Sequence[SplitFeatures], index: DatasetIndex, config: EvaluateConfig
) -> list[Scored]:
    """The scores, split by split, of what is fitted once to frozen features of the train split."""
    fitted, classes = (train.features, train.labels), index.num_classes
    match protocol:
        case "knn-20-v1":
            return _of_probe(knn_scores, train, splits, classes, config)
        case "linear-cached-v1":
            return _of_probe(linear_scores, train, splits, classes, config)
        case "fewshot-lsr-v1":
            return [Scored(few_shot_scores(*fitted, rows.features, rows.labels, classes)) for rows in splits]
        case "retrieval-v1":
            return [_retrieved(retrieval_values(*fitted, rows.features, rows.labels), config) for rows in splits]
        case _:
            assert_never(protocol)


def _of_probe(
    probe: Probe, train: SplitFeatures, splits: Sequence[SplitFeatures], classes: int, config
) -> list[Scored]:
    every = probe(train.features, train.labels, torch.cat([rows.features for rows in splits]), classes)
    parts = every.split([len(rows.labels) for rows in splits])
    return [
        classified(scores, rows.labels, bootstrap_samples=config.bootstrap_samples)
        for scores, rows in zip(parts, splits, strict=True)
    ]


def _retrieved(values: dict[str, Tensor], config: EvaluateConfig) -> Scored:
    parts = [mean_of(name, value, bootstrap_samples=config.bootstrap_samples) for name, value in values.items()]
    metrics = {name: value for part in parts for name, value in part.metrics.items()}
    intervals = {name: value for part in parts for name, value in part.intervals.items()}
    return Scored(metrics | {"count": float(len(values["map"]))}, intervals)


def head_of(source: ModelSource, rows: SplitFeatures, index: DatasetIndex) -> Tensor:
    """(S, V) logits of the dataset's classes, by their names; a model may know more classes than the dataset has.

    InputError where it does not know all.
    """
    if not source.classes and source.num_classes == index.num_classes:
        return rows.logits  # a head without names: the numbers are taken for the same
    if reason := unknown_classes(source, index.classes):
        raise InputError(f"MODEL `{source.reference}`: {reason}")
    places = {name: place for place, name in enumerate(source.classes)}
    return rows.logits[:, [places[name] for name in index.classes]]
