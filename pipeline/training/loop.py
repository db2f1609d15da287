"""The training loop of pretraining and fine-tuning: straight code, whichever the objective and the backend."""

import json
import logging
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from models.build import build_objective
from models.config import EncoderConfig
from models.inspection.reconstructions import reconstruction_sheet
from models.objectives.batch import Batch
from models.weights import WeightsError, load_encoder_weights
from pipeline.config.plan import BatchPlan
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import DataError, FaultError, InputError
from pipeline.loading.loader import Loader, RawBatch, to_device
from pipeline.loading.sources import Sources, open_sources
from pipeline.loading.stream import SampleStream
from pipeline.rank import Rank, Stopped
from pipeline.registry.weights import source_weights
from pipeline.run_directory import Checkpoint, write_json
from pipeline.shards.decoding import ImageFault
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import node_reader
from pipeline.training.agreement import plan_parts, require_same_plan
from pipeline.training.checkpoint import load_checkpoint, prune_checkpoints, save_checkpoint
from pipeline.training.engine import Engine, StepResult
from pipeline.training.ledger import Ledger, SampleRecorder, SpeedMeter
from pipeline.training.schedule import learning_rate
from pipeline.training.supply import DAMAGED, Supply
from pipeline.views.erasing import erase
from pipeline.views.evaluation import evaluation_view
from pipeline.views.mixing import mix_batch
from pipeline.views.pixels import view_dtype

MAX_SKIPPED_IN_A_ROW = 5
WARM_STEPS = 20  # after which the loader's speed can be told
log = logging.getLogger(__name__)


def train(me: Rank) -> None:
    """Train the run of `me.run` from its newest checkpoint, or from the start, to its last step. Collective."""
    _log_to_stdout(me)
    config, plan = read_run_config(me.run.path), me.run.plan()
    batches = BatchPlan(**plan["batches"])

    # 1. Data: a pure function of the position, so resuming is a seek. Workers read ahead while the model is made.
    me.phase = "data"
    sources = open_sources(config.data)
    _require_planned_data(sources, plan)
    checkpoint = me.run.newest_checkpoint()
    first_step, last_step = checkpoint.step if checkpoint else 0, plan["steps"]["steps"]
    store = require_same_plan(me, plan_parts(me, sources.indexes, first_step))
    supply = Supply(config, checkpoint.manifest if checkpoint else {})
    with Loader(
        SampleStream(config, sources.indexes), batches, rank=me.rank, first_step=first_step, last_step=last_step,
        workers=plan["loader_workers"], skipped=supply.skipped, ranks_per_node=plan["ranks_per_node"],
    ) as loader:  # fmt: skip
        # 2. Where the weights come from: (a) this run's newest checkpoint, else (b) another model, else (c) the seed.
        me.phase = "model"
        module = build_objective(config.objective, config.encoder, num_classes=plan["num_classes"], seed=config.seed)
        if checkpoint is None and config.initialise_from is not None:
            _initialise(module, config, plan)
        engine = Engine(module, config, batches, precision=plan["precision"])
        if checkpoint is not None:
            load_checkpoint(engine.state, checkpoint)
            log.info("resumed at step %d from %s", first_step, checkpoint.directory)
        _log_start(me, config, plan)

        # 3. Steps.
        me.phase = "train"
        if first_step < last_step:
            _train_steps(me, config, plan, engine, loader, supply, first_step, last_step)
    if me.is_first:
        write_json(me.run.result_file, _result(me, config, plan))
        try:
            _draw_reconstructions(me, config, module, sources.indexes[0])
        except (DataError, FaultError, ImageFault) as fault:  # a picture for a person decides no run
            log.warning("reconstructions.png was not drawn: %s", fault)
    del store  # rank 0 served it to the last


def _require_planned_data(sources: Sources, plan: dict) -> None:
    """The same samples in the same shards: else positions would mean other samples than before."""
    for what, found in (("fingerprint", sources.fingerprint), ("shards_sha256", sources.shards_sha256)):
        if plan["data"].get(what, found) != found:
            raise InputError(
                f"{sources.path}: the dataset changed since this run began: its {what} is {found}, the run was "
                f"planned on {plan['data'][what]}; restore that dataset, or start a new run on this one"
            )


def _train_steps(
    me: Rank, config: TrainingConfig, plan: dict, engine: Engine, loader: Loader, supply: Supply, first: int, last: int
) -> None:
    """Steps [first, last): read, augment, mix, update, report, save; all ranks leave together."""
    ledger = Ledger(me.attempt) if me.is_first else None
    recorder = SampleRecorder(me.attempt, me.rank, config.data.record)
    meter = SpeedMeter(config.global_batch_size, last)
    skipped_in_a_row = 0
    for step in range(first, last):
        me.step, started = step, time.perf_counter()
        rate = _rate(config, plan, step)
        micro_batches = _micro_batches(me, config, engine, loader, supply, recorder)
        result = engine.step(micro_batches, rate, stop=me.stop_requested, counts=supply.counts)
        supply.add(result.sums)
        meter.add(time.perf_counter() - started, supply.seconds_waited())
        done = step + 1

        skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
        if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradient was not finite for {skipped_in_a_row} steps in a row, up to step {done}; "
                "lower optimizer.learning_rate, clip with optimizer.max_grad_norm, or try precision: fp32"
            )
        if ledger is not None:
            figures = meter.figures(done)
            ledger.write(done, **_metrics(result, rate, config), **supply.metrics(loader, plan), **figures)
            if done % config.log_every_steps == 0 or done in (first + 1, last):
                _log_progress(done, last, result, figures)
            if done in (min(first + WARM_STEPS, last), last):
                log.info(supply.in_words(loader, figures, plan))

        rehearsal_stop = plan.get("stop_after_step") == done and me.attempt.number == 1
        stopping = (result.stop or rehearsal_stop) and done < last
        if done % config.checkpoint.every_steps == 0 or done == last or stopping:
            _save(me, config, plan, engine, supply, done)
        if stopping:
            raise Stopped(f"stopped on request at step {done} of {last}, checkpoint complete")


def _micro_batches(
    me: Rank, config: TrainingConfig, engine: Engine, loader: Loader, supply: Supply, recorder: SampleRecorder
) -> Iterator[Batch]:
    """Those of one step, each drawn when the one before has been used: normalised, erased and mixed on the device."""
    data, augmentation = config.data, config.augmentation
    for _ in range(engine.plan.gradient_accumulation_steps):
        raw = supply.draw(loader)
        recorder.write(me.step, raw.positions.tolist(), raw.keys)
        batch = to_device(raw, engine.device, data.mean, data.std, engine.compute_dtype)
        if augmentation.erase_probability:
            batch = erase(batch, raw.positions.numpy(), augmentation, config.seed)
        if augmentation.mixes:
            batch = mix_batch(batch, raw.positions.numpy(), augmentation, config.seed)
        yield batch


def _draw_reconstructions(me: Rank, config: TrainingConfig, module: torch.nn.Module, index: DatasetIndex) -> None:
    """A picture of masked images filled in, for objectives that can; under ZeRO-3 no rank holds the whole weights."""
    if config.objective.kind != "mae" or config.zero.stage == 3:
        return
    split = next(name for name in ("test", "validation", config.data.split) if name in index.splits)
    reader, data = node_reader(index, split), config.data
    chosen = range(min(6, int(reader.shard_sizes[0])))
    samples = [reader.read(0, number) for number in chosen]
    dtype = view_dtype(samples[0].image, samples[0].extension, config.encoder.channels)
    views = np.empty((len(samples), *config.encoder.input_size, config.encoder.channels), dtype)
    for sample, out in zip(samples, views, strict=True):
        evaluation_view(
            sample.image, sample.extension, out,
            crop=data.evaluation_crop, crop_mode=data.evaluation_crop_mode, mean=data.mean,
        )  # fmt: skip
    numbers = torch.arange(len(views))
    raw = RawBatch(torch.from_numpy(views), numbers, numbers, [], [])
    weight = next(module.parameters())
    images = to_device(raw, weight.device, data.mean, data.std, weight.dtype).images
    sheet = reconstruction_sheet(module, images, config.data.mean, config.data.std)
    sheet.save(me.run.path / "reconstructions.png")


def _rate(config: TrainingConfig, plan: dict, step: int) -> float:
    seen = (step + 1) * config.global_batch_size  # the rate of the end of the step: never zero
    return learning_rate(config.optimizer, seen, plan["steps"]["warmup_samples"], plan["steps"]["samples"])


def _save(me: Rank, config: TrainingConfig, plan: dict, engine: Engine, supply: Supply, step: int) -> None:
    me.phase = "checkpoint"
    started = time.perf_counter()
    facts = {
        "step": step,
        **supply.state(step),
        "stage": config.stage,
        "encoder": config.encoder.model_dump(),
        "objective": config.objective.model_dump(),
        "num_classes": plan["num_classes"],
        "ema": config.ema_decay > 0,
        "data_fingerprint": plan["data"]["fingerprint"],
        "config_sha256": plan["config_sha256"],
    }
    where = save_checkpoint(
        engine.state, me.run, me.attempt, rank=me.rank, world_size=me.world_size, frozen=engine.frozen, facts=facts
    )
    if me.is_first:
        log.info("saved %s in %.1f s", where.name, time.perf_counter() - started)
        prune_checkpoints(me.run, config.checkpoint.keep)
    me.phase = "train"


def _initialise(module: torch.nn.Module, config: TrainingConfig, plan: dict) -> None:
    source = plan["initialise_from"]
    try:
        grid = EncoderConfig.model_validate(source["encoder"]).grid if source["encoder"] else None
        report = load_encoder_weights(module.encoder, source_weights(source), head=False, grid=grid)
    except WeightsError as error:
        raise InputError(f"initialise_from {config.initialise_from}: {error}") from error
    log.info("initialised from %s: %s", config.initialise_from, report)


def _metrics(result: StepResult, rate: float, config: TrainingConfig) -> dict[str, float]:
    metrics = {
        "train/loss": result.loss,
        "train/learning_rate": rate,
        "train/gradient_norm": result.gradient_norm,
        "train/skipped": float(result.skipped),
    }
    return metrics | {
        f"train/{name}": total / config.global_batch_size
        for name, total in result.sums.items()
        if not name.startswith(DAMAGED)
    }


def _log_progress(step: int, last: int, result: StepResult, figures: dict[str, float]) -> None:
    log.info(
        "step %d/%d  loss %.4f  gradient norm %.3f  %.1f images/s  data wait %.0f %%  %.0f s left%s",
        step, last, result.loss, result.gradient_norm, figures["perf/images_per_second"],
        100 * figures["perf/data_wait_share"], figures["perf/seconds_left"], "  (skipped)" if result.skipped else "",
    )  # fmt: skip


def _log_start(me: Rank, config: TrainingConfig, plan: dict) -> None:
    batches = plan["batches"]
    log.info(
        "global batch %d = %d ranks x %d images x %d accumulated; ZeRO stage %d, %s, %d steps, clip %s",
        batches["global_batch_size"], batches["world_size"], batches["micro_batch_size"],
        batches["gradient_accumulation_steps"], config.zero.stage, plan["precision"], plan["steps"]["steps"],
        config.optimizer.max_grad_norm or "off",
    )  # fmt: skip


def _result(me: Rank, config: TrainingConfig, plan: dict) -> dict:
    checkpoint: Checkpoint | None = me.run.newest_checkpoint()
    last = _last_ledger_line(me)
    return {
        "format_version": 1,
        "stage": config.stage,
        "rehearsal": bool(plan.get("rehearsal")),
        "steps": plan["steps"]["steps"],
        "checkpoint": str(checkpoint.directory) if checkpoint else None,
        "data_fingerprint": plan["data"]["fingerprint"],
        "metrics": {key: value for key, value in last.items() if "/" in key},
    }


def _last_ledger_line(me: Rank) -> dict:
    for number in range(me.attempt.number, 0, -1):
        ledger = me.run.attempt(number).ledger
        if ledger.is_file() and (lines := ledger.read_text().splitlines()):
            return json.loads(lines[-1])
    return {}


def _log_to_stdout(me: Rank) -> None:
    """Rank 0 tells the run's story; the others speak up only when something is wrong."""
    level = logging.INFO if me.is_first else logging.WARNING
    logging.basicConfig(
        stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("pipeline").setLevel(level)
