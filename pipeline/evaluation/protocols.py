"""Named, versioned protocols: each fixes pooling, preprocessing and selection, and its name is in the metric's name.

classify-v1       the model's own head
knn-20-v1         20 nearest neighbours by cosine on the mean patch token (knn.py)
linear-cached-v1  logistic regression on the same features, penalty chosen on held-back training samples (linear.py)

Preprocessing of all: shorter side to image_size / evaluation_crop, centre crop, the model's own mean and deviation.
"""

import logging
import sys
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.stages import EvaluateConfig, read_run_config
from pipeline.errors import InputError
from pipeline.evaluation.features import SplitFeatures, extract_features
from pipeline.evaluation.knn import knn_scores
from pipeline.evaluation.linear import linear_scores
from pipeline.evaluation.scores import classification_scores
from pipeline.rank import Rank
from pipeline.registry.locate import ModelSource, source_from_dict
from pipeline.registry.weights import load_model
from pipeline.run_directory import write_json
from pipeline.shards.index import read_index

log = logging.getLogger(__name__)


def evaluate(me: Rank) -> None:
    """Score every model of the config under every protocol; rank 0 writes `result.json`. Collective."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config, plan = read_run_config(me.run.path), me.run.plan()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", me.local_rank) if cuda else torch.device("cpu")
    if me.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", rank=me.rank, world_size=me.world_size)
    index = read_index(config.data)
    metrics = {}
    for number, (name, raw) in enumerate(plan["sources"].items()):
        me.phase = f"evaluate {name}"
        source = source_from_dict(raw)
        model = load_model(source).to(device)
        folder = me.attempt.path / "features" / str(number)
        parts = {
            split: extract_features(
                model, source, index, split, batch_size=config.batch_size, rank=me.rank, world_size=me.world_size,
                folder=folder,
            )
            for split in _splits_needed(config)
        }  # fmt: skip
        if me.is_first:
            metrics[name] = _score(config, source, index.classes, parts)
            log.info(
                "%s: %s", name, {key: round(value, 4) for key, value in metrics[name].items() if key.endswith("top1")}
            )
    if me.is_first:
        write_json(
            me.run.result_file,
            {"format_version": 1, "stage": "evaluate", "metrics": metrics, "data_fingerprint": index.fingerprint,
             "dataset": config.dataset, "split": config.split},
        )  # fmt: skip
    if me.world_size > 1:
        dist.barrier()


def _splits_needed(config: EvaluateConfig) -> list[str]:
    needs_train = any(protocol != "classify-v1" for protocol in config.protocols)
    return ["train", config.split] if needs_train else [config.split]


def _score(config: EvaluateConfig, source: ModelSource, classes, parts: dict[str, SplitFeatures]) -> dict[str, float]:
    metrics = {}
    for protocol in config.protocols:
        scored = parts[config.split]
        logits = _protocol_logits(protocol, source, classes, parts, config.split)
        for metric, value in classification_scores(logits, scored.labels).items():
            metrics[f"eval/{protocol}/{config.dataset}/{metric}"] = value
    return metrics


def _protocol_logits(
    protocol: str, source: ModelSource, classes, parts: dict[str, SplitFeatures], split: str
) -> Tensor:
    scored = parts[split]
    match protocol:
        case "classify-v1":
            if tuple(source.classes) != tuple(classes):
                raise InputError(
                    f"MODEL `{source.reference}` knows classes {_few(source.classes)}, the dataset has {_few(classes)}"
                )
            return scored.logits
        case "knn-20-v1":
            return knn_scores(parts["train"].features, parts["train"].labels, scored.features, len(classes))
        case _:
            with warnings.catch_warnings():  # an unconverged probe in the sweep is scored like any other
                warnings.simplefilter("ignore")
                return linear_scores(parts["train"].features, parts["train"].labels, scored.features, len(classes))


def _few(classes) -> str:
    return f"{len(classes)} ({', '.join(map(str, list(classes)[:5]))}{', ...' if len(classes) > 5 else ''})"
