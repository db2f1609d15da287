"""One evaluation: every model on every dataset under every protocol; rank 0 scores, all ranks extract.

Features of a model on a split are extracted once, whatever number of protocols reads them, and kept in the home.
"""

import datetime
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.protocols import NEEDS
from pipeline.config.stages import read_run_config
from pipeline.evaluation.dense.scoring import dense_scores
from pipeline.evaluation.differences import differences_from_first
from pipeline.evaluation.feature_cache import feature_key, keep_features, read_features
from pipeline.evaluation.features import Extraction, SplitFeatures, extract_features
from pipeline.evaluation.robustness import robustness
from pipeline.evaluation.scores import Scored
from pipeline.evaluation.scoring import head_of, scored_by_features, scored_by_head
from pipeline.evaluation.tables import folder_name, write_details, write_per_class, write_table
from pipeline.loading.evaluation_stream import Alteration
from pipeline.loading.left_out import num_scored
from pipeline.rank import Rank
from pipeline.registry.locate import ModelSource, source_from_dict, unknown_classes
from pipeline.registry.weights import load_model
from pipeline.run_directory import write_json
from pipeline.shards.atomic import give_usual_rights
from pipeline.shards.index import DatasetIndex, read_index

log = logging.getLogger(__name__)
PATIENCE = datetime.timedelta(days=2)  # of the ranks that are done, for the others
TRAIN, SELECTION = "train", "validation"


def evaluate(me: Rank) -> None:
    """Carry the config's evaluation out; rank 0 writes `result.json`, `table.csv` and `scores/`. Collective."""
    tell_terminal(me)
    config, plan = read_run_config(me.run.path), me.run.plan()
    if me.is_first:  # what killed attempts left
        for left in set(me.run.path.glob("attempts/*/patches")) - {me.attempt.path / "patches"}:
            shutil.rmtree(left, ignore_errors=True)
    work = Evaluation(me, config, plan, _extraction(me, config, plan))
    for model in config.models:
        for dataset in config.datasets:
            work.score(model, dataset)
    if me.is_first:
        samples = config.bootstrap_samples
        work.result["differences"] = differences_from_first(work.correct, bootstrap_samples=samples)
        write_table(me.run.path / "table.csv", work.result)
        write_json(me.run.result_file, work.result)
    if me.world_size > 1:
        dist.barrier()


def _extraction(me: Rank, config: EvaluateConfig, plan: dict[str, Any]) -> Extraction:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", me.local_rank) if cuda else torch.device("cpu")
    meet_patiently(me)
    return Extraction(
        me.rank, me.world_size, device, config.batch_size, plan["loader_workers"], config.precision,
        me.attempt.path / "features", log.info,
    )  # fmt: skip


def meet_patiently(me: Rank) -> None:
    """A group of ranks that hand each other nothing but files and a few words, and wait long for those that work."""
    if me.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", rank=me.rank, world_size=me.world_size, timeout=PATIENCE)


def tell_terminal(me: Rank) -> None:
    """Send the log of rank 0 to whoever follows the run too."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if me.is_first:
        events = logging.FileHandler(me.attempt.events)
        events.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("pipeline").addHandler(events)


class Evaluation:
    """The scores so far, in `result`, and the model that is on the device."""

    def __init__(self, me: Rank, config: EvaluateConfig, plan: dict[str, Any], how: Extraction):
        self.me, self.config, self.plan, self.how = me, config, plan, how
        self.cache = Path(plan["home"]) / "cache" / "features" if config.reuse_features else None
        self.indexes = {name: read_index(dataset.path) for name, dataset in config.datasets.items()}
        self.loaded: tuple[str, nn.Module] | None = None
        self.correct: dict[str, dict[str, Tensor]] = {}  # by model and eval/PROTOCOL/DATASET
        fingerprints = {index.remaining_fingerprint for index in self.indexes.values()}
        self.result: dict[str, Any] = {
            "format_version": 2, "stage": "evaluate", "metrics": {}, "intervals": {}, "predictions": {},
            "datasets": {}, "unavailable": dict(config.unavailable), "differences": {},
            "data_fingerprint": fingerprints.pop() if len(fingerprints) == 1 else None,
        }  # fmt: skip

    def score(self, model: str, dataset: str) -> None:
        """Everything that the config asks of one model on one dataset. Collective."""
        asked, index = self.config.datasets[dataset], self.indexes[dataset]
        splits = [split for split in self.config.splits if split in index.splits]
        source = source_from_dict(self.plan["sources"][model])
        own = {name: name for name in asked.protocols if not NEEDS[name].recipe}
        if (reason := _headless(source, index)) is not None:
            for name in [name for name in own if NEEDS[name].head]:
                log.info("%s, %s on %s: left out: %s", model, own.pop(name), dataset, reason)
        if own:
            self._score_source(model, dataset, source, own, splits)
        for protocol, run in self.config.trained.get(model, {}).get(dataset, {}).items():
            source = source_from_dict(self.plan["trained"][run])
            self._score_source(model, dataset, source, {protocol: "classify-v1"}, splits)

    def _score_source(
        self, model: str, dataset: str, source: ModelSource, protocols: dict[str, str], splits: list[str]
    ) -> None:
        """`protocols` are those that are scored, by the names that their metrics get."""
        index, network = self.indexes[dataset], self._network(source)
        if dense := {name: kind for name, kind in protocols.items() if NEEDS[kind].dense}:
            self._score_densely(model, dataset, source, dense, splits)
            protocols = {name: kind for name, kind in protocols.items() if name not in dense}
        if not protocols:
            return
        rows: dict[str, SplitFeatures | None] = {}
        if any(NEEDS[kind].features for kind in protocols.values()):
            rows[TRAIN] = self._features(network, source, index, TRAIN, head=False)
        for split in splits:
            if split not in rows:
                rows[split] = self._features(network, source, index, split)
        for name, kind in protocols.items():
            self.me.phase = f"evaluate {model}: {name} on {dataset}"
            if kind == "corruptions-v1":
                scored = [self._robustness(network, source, index, split, rows[split]) for split in splits]
            elif not self.me.is_first:
                continue
            elif NEEDS[kind].features:
                scored = scored_by_features(kind, rows[TRAIN], [rows[split] for split in splits], index, self.config)
            else:
                selection = rows.get(SELECTION)
                scored = [
                    scored_by_head(
                        kind, source, rows[split], index, self.config, None if split == SELECTION else selection
                    )
                    for split in splits
                ]
            if self.me.is_first:
                for split, one in zip(splits, scored, strict=True):
                    self._take(model, dataset, split, name, one)

    def _score_densely(
        self, model: str, dataset: str, source: ModelSource, protocols: dict[str, str], splits: list[str]
    ) -> None:
        def begin(what: str) -> None:
            self.me.phase = f"evaluate {model}: {what} on {dataset}"

        place = self.me.attempt.path / "patches"
        for name, scored in dense_scores(
            self._network(source), source, self.indexes[dataset], protocols, splits, self.how, place,
            bootstrap_samples=self.config.bootstrap_samples, begin=begin,
        ):  # fmt: skip
            for split, one in zip(splits, scored, strict=True):
                if one is not None:
                    self._take(model, dataset, split, name, one)

    def _network(self, source: ModelSource) -> nn.Module:
        if self.loaded is None or self.loaded[0] != source.reference:
            self.loaded = None  # its memory goes before the next takes its own
            self.loaded = source.reference, load_model(source).to(self.how.device)
        return self.loaded[1]

    def _features(
        self, network: nn.Module, source: ModelSource, index: DatasetIndex, split: str, *, head: bool = True
    ) -> SplitFeatures | None:
        """All rows on rank 0, None elsewhere; from the home where they are kept. Collective.

        `head`: with logits, of which those of a train split would be the most and are read by nobody.
        """
        self.me.phase = f"features of {source.reference} on {index.directory.name}, {split}"
        if self.cache is None:
            return extract_features(network, source, index, split, self.how, head=head)
        key = feature_key(network, source, index, split, self.config.precision, head) if self.me.is_first else ""
        found = read_features(self.cache, key) if self.me.is_first else None
        if not self._agreed(found is None):
            return found
        rows = extract_features(network, source, index, split, self.how, head=head)
        if rows is not None:
            keep_features(self.cache, key, rows)
        return rows

    def _agreed(self, of_first: bool) -> bool:
        """What rank 0 says, on every rank."""
        if self.me.world_size == 1:
            return of_first
        said = torch.tensor([int(of_first)])
        dist.broadcast(said, 0)
        return bool(said)

    def _robustness(
        self, network: nn.Module, source: ModelSource, index: DatasetIndex, split: str, clean: SplitFeatures | None
    ) -> Scored | None:
        def correct(rows: SplitFeatures | None) -> Tensor | None:
            return None if rows is None else head_of(source, rows, index).argmax(dim=1) == rows.labels

        def decide(alter: Alteration) -> Tensor | None:
            return correct(extract_features(network, source, index, split, self.how, alter))

        return robustness(decide, correct(clean), bootstrap_samples=self.config.bootstrap_samples)

    def _take(self, model: str, dataset: str, split: str, protocol: str, scored: Scored) -> None:
        index = self.indexes[dataset]
        name = dataset if split == "test" else f"{dataset}.{split}"
        self.result["datasets"][name] = {
            "path": str(index.directory), "fingerprint": index.remaining_fingerprint, "split": split,
            "count": num_scored(index, split), "left_out": index.num_samples(split) - num_scored(index, split),
            "group": self.config.datasets[dataset].group,
        }  # fmt: skip
        prefix = f"eval/{protocol}/{name}"
        for kind, values in (("metrics", scored.metrics), ("intervals", scored.intervals)):
            kept = self.result[kind].setdefault(model, {})
            kept |= {f"{prefix}/{metric}": value for metric, value in values.items()}
        log.info("%s, %s on %s: %s", model, protocol, name, _in_words(scored.metrics))
        folder = self.me.run.path / "scores" / folder_name(model) / folder_name(protocol, name)
        if scored.per_class is not None:
            write_per_class(folder, scored.per_class)
        if scored.predictions is None:
            return
        self.correct.setdefault(model, {})[prefix] = scored.predictions["correct"]
        write_details(folder, scored, index, split, self.config.worst_images)
        file = folder / "predictions.safetensors"
        save_file({key: value.contiguous() for key, value in scored.predictions.items()}, file)
        give_usual_rights(file)
        self.result["predictions"].setdefault(model, {})[prefix] = str(file.relative_to(self.me.run.path))


def _headless(source: ModelSource, index: DatasetIndex) -> str | None:
    """Why a model's own head cannot be scored on a dataset; None where it can."""
    if not source.num_classes:
        return "it has no head"
    if source.classes:
        return unknown_classes(source, index.classes)
    if source.num_classes != index.num_classes:
        return f"its head is for {source.num_classes:,} classes without names, the dataset has {index.num_classes:,}"
    return None


def _in_words(metrics: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in list(metrics.items())[:3])
