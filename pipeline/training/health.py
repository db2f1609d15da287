"""The health of the model in training, measured on a fixed set of images: the same numbers at any world size.

Every rank sees its rows once; features, as many as there are images, and sums come together, and rank 0 judges. The
images are read once, when first measured, and kept as they are before they are normalised.
"""

import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.encoders.config import EncoderConfig
from models.encoders.size import encoder_tokens
from models.inspection.attention_weights import relative_entropy, watched_blocks
from models.inspection.display import NothingToDraw
from models.inspection.explained import explained_share, explained_sums
from models.objectives.batch import Batch
from pipeline.config.plan import BatchPlan
from pipeline.config.training import TrainingConfig
from pipeline.config.validation import SPLIT
from pipeline.evaluation.features import features_of
from pipeline.health.bands import read_bands
from pipeline.health.log import bad_in_a_row, read_verdicts, write_verdicts
from pipeline.health.measures import of_features, of_labels
from pipeline.health.verdicts import Moment, Value, Verdict, bad_in_words, in_one_line, is_bad, judge
from pipeline.loading.fixed_sample import FixedSample, Part, training_selection
from pipeline.loading.left_out import all_but_left_out
from pipeline.loading.loader import Loader, RawBatch, to_device
from pipeline.loading.sources import Sources
from pipeline.rank import Rank
from pipeline.training.engine import Engine
from pipeline.training.validation import evaluation_input

MOST_ROWS = 64  # images per rank per forward
MOST_ATTENTION_BYTES = 1 << 28  # of a block's attention weights in such a forward, in fp32
log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What a step's measurement says, the same on every rank."""

    scores: dict[str, float] = {}  # for the ledger
    reason: str | None = None  # why the run is to stop; see `Health.last_words`


NOTHING_MEASURED = Measured()


class Found(NamedTuple):
    """What all ranks found of one split, in the order of its rows."""

    features: Tensor  # (N, D) float32
    labels: Tensor  # (N,) int64
    entropy: float | None  # of the attention; None where the network shows none
    explained: float | None  # None where the objective hides nothing


class NotMeasured(Exception):
    """What a measurement needs could not be had on some rank; said on all of them."""


class Health:
    """Measures the run from `first_step` to `last_step`. A context manager: workers of its own read the images.

    To be made on the main thread before the accelerator is touched, like a Loader. Collective: all ranks call it alike.
    """

    def __init__(
        self, me: Rank, config: TrainingConfig, plan: dict, sources: Sources, first_step: int, last_step: int
    ):  # fmt: skip
        self.me, self.config, self.plan, self.sources = me, config, plan, sources
        self.every, self.last = config.health.every_steps, plan["steps"]["steps"]
        self.loader: Loader | None = None
        if not self.every or first_step == last_step:
            return
        data = config.data
        held_out = [index for index in sources.indexes if SPLIT in index.splits and index.num_samples(SPLIT)]
        parts = [Part(data.split, sources.indexes, training_selection(data.label_fraction, data.max_samples))]
        if held_out and SPLIT != data.split:
            parts.append(Part(SPLIT, held_out, all_but_left_out))
        ranks, images = plan["batches"]["world_size"], config.health.images
        self.rows = min(config.micro_batch_size, -(-images // ranks), _rows_that_fit(config))
        self.sample = FixedSample(parts, images, self.rows * ranks, evaluation_input(config), sources.classes)
        self.loader = Loader(
            self.sample, BatchPlan(self.rows * ranks, self.rows, ranks, 1), rank=me.rank, first_step=0,
            last_step=self.sample.batches, workers=plan["loader_workers"],
        )  # fmt: skip
        self.kept: list[tuple[int, RawBatch]] = []
        self.reading = False
        self.bands = read_bands(me.run.path) if me.is_first else None
        self.count_until(first_step)
        self._tell_what_is_measured([part.split for part in parts])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: Any) -> None:
        if self.loader is not None:
            self.loader.close()

    def _tell_what_is_measured(self, splits: Sequence[str]) -> None:
        sizes = [
            f"{stream.num_samples:,} of {split}" for stream, split in zip(self.sample.streams, splits, strict=True)
        ]
        lack = "" if len(splits) > 1 else f"; there is no split {SPLIT}, so all of it is of images that it learns from"
        reference = f"expected: {self.bands.basis}" if self.bands else "no reference"
        log.info("health every %s steps on images: %s%s; %s", f"{self.every:,}", ", ".join(sizes), lack, reference)

    def measure(self, engine: Engine, done: int) -> Measured:
        """Of the state after `done` steps, averaged where the run keeps an average. Nothing where none is due.

        Rank 0 writes health.jsonl and says it in one line. A measurement that fails is a warning, and none was made;
        but under ZeRO-3, whose ranks meet in each forward, one that fails there ends the run.
        """
        if not self.every or (done % self.every and done != self.last):
            return NOTHING_MEASURED
        phase = self.me.phase
        try:
            measured = self._measured(engine, done)
        except NotMeasured as failed:
            measured = NOTHING_MEASURED
            if self.me.is_first:
                log.warning("health of step %d could not be measured, and training goes on: %s", done, failed)
        self.me.phase = phase
        return measured

    def count_until(self, step: int) -> None:
        """Take the row of bad measurements from the log, where the run goes on behind `step` steps."""
        if self.loader is not None and self.me.is_first:
            self.bad_in_a_row = bad_in_a_row(one for one in read_verdicts(self.me.run) if one[0].step <= step)

    def _measured(self, engine: Engine, done: int) -> Measured:
        """NotMeasured, on all ranks, where it failed on one. Collective."""
        started = time.perf_counter()
        self._together(self._keep_images)
        with engine.asking() as ask:
            look = partial(self._looked, ask, engine)
            seen = look() if engine.stage == 3 and self.me.world_size > 1 else self._together(look)
        found = [_of_all_rows(rows, sums) for rows, sums in seen]
        told = [self._together(lambda: self._judged(found, done, started) if self.me.is_first else None)]
        if self.me.world_size > 1:
            dist.broadcast_object_list(told, device=engine.device)
        return Measured(*told[0])

    def _together(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, which meets no other rank. Collective.

        NotMeasured on all ranks where it raised on one.
        """
        result = failure = None
        try:
            result = work()
        except Exception as error:  # whatever it is: it leaves the weights alone
            failure = _in_one_line(error)
        failures = [failure] * self.me.world_size
        if self.me.world_size > 1:
            dist.all_gather_object(failures, failure)
        for rank, words in enumerate(failures):
            if words is not None:
                raise NotMeasured(f"rank {rank}: {words}")
        return result

    def _keep_images(self) -> None:
        """This rank's rows of the fixed sample; read once, and anew where reading has failed."""
        if self.reading:
            self.kept = []
            self.loader.begin_again(0, ())
        self.reading = len(self.kept) < self.sample.batches
        while len(self.kept) < self.sample.batches:
            self.me.phase = "health"
            raw = next(self.loader)
            for one in raw.damaged:
                log.warning("health leaves out a damaged image: %s", one.detail)
            part, _ = self.sample.place(int(raw.positions[0]))
            self.kept.append((part, raw._replace(images=raw.images.clone())))
        self.loader.close()
        self.reading = False

    def _looked(self, ask: Callable, engine: Engine) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
        """Of each part, this rank's rows and sums. Collective under ZeRO-3."""
        return [self._of_part(number, ask, engine) for number in range(len(self.sample.streams))]

    def _of_part(self, number: int, ask: Callable, engine: Engine) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Columns of this rank's rows: features, labels, positions, whether each is counted; and sums over them."""
        stream, data, start = self.sample.streams[number], self.config.data, int(self.sample.starts[number])
        looks_closer = number == len(self.sample.streams) - 1
        rows, sums = [], {}
        for part, raw in self.kept:
            if part != number:
                continue
            self.me.phase = "health"  # said again: each batch is a sign of life
            batch = to_device(raw, engine.device, data.mean, data.std, engine.compute_dtype)
            batch = batch._replace(positions=batch.positions - start)
            damaged = torch.isin(raw.positions, torch.tensor([one.position for one in raw.damaged], dtype=torch.int64))
            counted = (batch.positions < stream.num_samples) & ~damaged.to(engine.device)
            look = _Look(engine.module, counted, entropy=looks_closer, explained=looks_closer)
            features, *closer = ask(look, batch)
            _add(dict(zip(look.names, closer, strict=True)), sums)
            rows.append((features.float(), batch.labels, batch.positions, counted))
        return [torch.cat(column) for column in zip(*rows, strict=True)], sums

    def _values(self, found: Sequence[Found]) -> list[Value]:
        """What is measured of the parts: rank and spread of training images, the rest of held-out ones if there are."""
        first, last = found[0], found[-1]
        if not (len(first.features) and len(last.features)):
            raise ValueError("no image of the fixed sample can be read")
        values = [] if last.explained is None else [Value("explained_variance", last.explained)]
        values += of_features(first.features)
        if last.entropy is not None:
            values.append(Value("attention_entropy", last.entropy))
        classes = self.sources.classes
        if len(found) > 1 and classes and all(index.label_sets is None for index in self.sources.indexes):
            columns = (column.cpu() for one in (first, last) for column in (one.features, one.labels))
            values += of_labels(*columns, len(classes))
        return values

    def _judged(self, found: Sequence[Found], done: int, started: float) -> tuple[dict[str, float], str | None]:
        """Rank 0's: for the ledger, and why the run is to stop."""
        values = self._values(found)
        samples = done * self.config.global_batch_size
        moment = Moment(done, samples, samples / self.plan["samples_per_epoch"], done / self.last)
        verdicts = [judge(value, moment, self.bands, self.config.health) for value in values]
        if not verdicts:
            return {}, None
        try:
            write_verdicts(self.me.attempt, verdicts)
        except OSError as error:
            log.warning("verdicts on the health of step %d could not be written: %s", done, error)
        self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad(verdicts) else 0
        seconds = time.perf_counter() - started
        log.log(logging.WARNING if self.bad_in_a_row else logging.INFO, "%s", in_one_line(verdicts))
        scores = {f"health/{value.metric}": value.value for value in values}
        return scores | {"perf/health_seconds": round(seconds, 4)}, self._reason(verdicts)

    def _reason(self, verdicts: Sequence[Verdict]) -> str | None:
        health, count = self.config.health, self.bad_in_a_row
        if health.policy != "stop" or count < health.patience:
            return None
        return f"health was bad {count} times in a row: {bad_in_words(verdicts)}"

    def last_words(self, reason: str, step: int) -> str:
        """Of a run that stops for a measurement's `reason`, with `step` as its newest checkpoint, or 0 without one."""
        kept = f"the checkpoint of step {step} stands" if step else "there is no checkpoint yet"
        return (
            f"{reason}; {kept}. In a new run lower optimizer.learning_rate or raise optimizer.warmup, and look at the "
            f"images of {self.plan['data']['name']}; to go on all the same: vit resume {self.me.run.path} "
            "--set health.policy=report"
        )


class _Look:
    """Called with a batch inside the network's forward: features (B, D), then a tensor for each of `names`."""

    def __init__(self, module: nn.Module, counted: Tensor, *, entropy: bool, explained: bool):
        self.module, self.counted, self.names = module, counted, []
        self.entropy, self.explained = entropy, explained and hasattr(module, "hidden_predictions")

    def __call__(self, batch: Batch) -> tuple[Tensor, ...]:
        encoder, found = self.module.encoder, []
        tokens = None
        if self.entropy:
            try:
                with watched_blocks(encoder, relative_entropy) as found:
                    tokens = encoder.forward_features(batch.images)
            except NothingToDraw:
                found = []
        if tokens is None:
            tokens = encoder.forward_features(batch.images)
        sums = {}
        if found:
            of_images = torch.stack(found).mean(dim=0).double()  # (B,)
            sums |= {"entropy": (of_images * self.counted).sum().view(1), "images": self.counted.sum().double().view(1)}
        if self.explained:
            sums |= explained_sums(*self.module.hidden_predictions(batch.images, batch.positions), self.counted)
        self.names = list(sums)
        return features_of(encoder, tokens), *sums.values()


def _in_one_line(error: Exception) -> str:
    """Kind, message and place; of a message with a traceback in it what began and what ended that."""
    first, *others = str(error).strip().splitlines() or [""]
    words = f"{first} {others[-1]}" if others and first.endswith(":") else first
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {words} ({Path(place.filename).name}:{place.lineno})"


def _rows_that_fit(config: TrainingConfig) -> int:
    encoder = config.encoder
    if not isinstance(encoder, EncoderConfig):
        return MOST_ROWS
    of_image = 4 * encoder.num_heads * encoder_tokens(encoder) ** 2
    return max(1, min(MOST_ROWS, MOST_ATTENTION_BYTES // of_image))


def _of_all_rows(rows: Sequence[Tensor], sums: Mapping[str, Tensor]) -> Found:
    """What all ranks found together. Collective."""
    features, labels, positions, counted = map(_of_all_ranks, rows)
    order = positions.argsort()
    order = order[counted[order]]
    return Found(features[order], labels[order], *_closer(_summed(sums)))


def _closer(sums: Mapping[str, Tensor]) -> tuple[float | None, float | None]:
    """Mean entropy of the attention and explained share, each None where it was not looked for."""
    entropy = (sums["entropy"] / sums["images"]).item() if "entropy" in sums else None
    if "error" not in sums:
        return entropy, None
    share = explained_share(sums)
    # Targets that do not vary have no share to be explained; a prediction that is not finite is another matter.
    return entropy, None if math.isnan(share) and torch.isfinite(sums["error"]).all() else share


def _add(values: Mapping[str, Tensor], totals: dict[str, Tensor]) -> None:
    for name, value in values.items():
        totals[name] = totals[name] + value if name in totals else value


def _summed(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Over all ranks. Collective."""
    if sums and dist.is_initialized():
        packed = torch.cat(list(sums.values()))
        dist.all_reduce(packed)
        return dict(zip(sums, packed.split([len(value) for value in sums.values()]), strict=True))
    return dict(sums)


def _of_all_ranks(rows: Tensor) -> Tensor:
    """The rows of all ranks, as many of each, one rank behind the other. Collective."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
