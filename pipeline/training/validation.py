"""Scores of the model in training on the split `validation`: every sample exactly once, the same at any world size."""

import logging
import time
from collections.abc import Iterator
from typing import Any, Self

from torch import Tensor

from models.objectives.batch import Batch
from pipeline.checkpoints.retention import BestSoFar
from pipeline.config.plan import BatchPlan
from pipeline.config.training import TrainingConfig
from pipeline.config.validation import SPLIT
from pipeline.errors import InputError
from pipeline.loading.evaluation_stream import EvaluationStream
from pipeline.loading.loader import Loader, to_device
from pipeline.loading.sources import Sources
from pipeline.rank import Rank
from pipeline.shards.index import DatasetIndex
from pipeline.training.engine import Engine
from pipeline.views.evaluation import EvaluationInput

ENDLESS = 1 << 40  # batches: pass after pass, as many as the run asks for
log = logging.getLogger(__name__)


class Validation:
    """The scores of a run that goes from `first_step` to `last_step`. A context manager: workers of its own read ahead.

    To be made on the main thread before the accelerator is touched, like a Loader. Collective: all ranks call it alike.
    """

    def __init__(
        self, me: Rank, config: TrainingConfig, plan: dict, sources: Sources, first_step: int, last_step: int
    ):  # fmt: skip
        self.me, self.config, self.every, self.last = me, config, config.validation.every_steps, plan["steps"]["steps"]
        self.loader = None
        if not self.every or first_step == last_step:
            return
        micro, ranks = config.micro_batch_size, plan["batches"]["world_size"]
        self.best = BestSoFar(me.run.committed_checkpoints(), config.validation.best_metric)
        self.stream = EvaluationStream(
            _with_samples(sources), SPLIT, micro * ranks, evaluation_input(config), sources.classes
        )  # fmt: skip
        self.loader = Loader(
            self.stream, BatchPlan(micro * ranks, micro, ranks, 1), rank=me.rank, first_step=0,
            last_step=ENDLESS, workers=plan["loader_workers"],
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        if self.loader is not None:
            self.loader.close()

    def scores(self, engine: Engine, done: int) -> dict[str, float]:
        """Of the state after `done` steps, averaged where the run keeps an average; {} where none are due.

        `validation/loss`, the objective's own, and `validation/accuracy` where the samples have labels to be guessed;
        means over all samples of the split. Masks are those of the samples' places in the split, each time the same.
        """
        if not self.every or (done % self.every and done != self.last):
            return {}
        self.me.phase, started = "validation", time.perf_counter()
        sums = engine.evaluate(self._batches(engine))
        count = int(sums.pop("count"))
        assert count == self.stream.num_samples, f"{count} of {self.stream.num_samples} samples were scored"
        scores = {f"{SPLIT}/{name}": total / count for name, total in sums.items()}
        if self.me.is_first:
            marks = {self.best.metric: " (best so far)"} if self.best.take(scores) else {}
            told = ", ".join(
                f"{name.removeprefix(SPLIT + '/')} {value:.4f}{marks.get(name, '')}" for name, value in scores.items()
            )
            seconds = time.perf_counter() - started
            log.info("validation at step %d: %s, %s images in %.1f s", done, told, f"{count:,}", seconds)
        self.me.phase = "train"
        return scores

    def _batches(self, engine: Engine) -> Iterator[tuple[Batch, Tensor]]:
        """(batch, (B,) whether each row is a sample and no padding) of one pass; as many on every rank."""
        data = self.config.data
        for _ in range(self.stream.batches):
            self.me.phase = "validation"  # said again: each batch is a sign of life
            raw = next(self.loader)
            rows = raw.positions % self.stream.rows
            batch = to_device(
                raw._replace(positions=rows), engine.device, data.mean, data.std, engine.compute_dtype
            )  # fmt: skip
            yield batch, batch.positions < self.stream.num_samples


def evaluation_input(config: TrainingConfig) -> EvaluationInput:
    """How the images that a training is scored on become inputs."""
    encoder, data = config.encoder, config.data
    return EvaluationInput(
        encoder.input_size, encoder.channels, data.evaluation_crop, data.evaluation_crop_mode, data.mean
    )  # fmt: skip


def _with_samples(sources: Sources) -> list[DatasetIndex]:
    found = [index for index in sources.indexes if SPLIT in index.splits and index.num_samples(SPLIT)]
    if not found:
        raise InputError(f"validation.every_steps: {sources.path} has no samples in a split `{SPLIT}`; set it to 0")
    return found
