"""The training loop of pretraining and fine-tuning: straight code, whichever the objective and the backend."""

import logging
import time
from collections.abc import Iterator

import torch

from models.build import build_objective
from models.config import EncoderConfig
from models.objectives.batch import Batch
from models.weights import WeightsError, load_encoder_weights
from pipeline.config.plan import BatchPlan, StepPlan
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.loading.loader import Loader, to_device
from pipeline.loading.sources import Sources, open_sources
from pipeline.loading.stream import SampleStream
from pipeline.rank import Rank, Stopped
from pipeline.registry.weights import source_weights
from pipeline.run_directory import write_json
from pipeline.training.agreement import plan_parts, require_same_plan
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.engine import Engine
from pipeline.training.ledger import SampleRecorder
from pipeline.training.reconstructions import draw_reconstructions
from pipeline.training.report import Report, log_start, log_to_stdout, result_of
from pipeline.training.saving import Saver
from pipeline.training.schedule import learning_rate
from pipeline.training.supply import Supply
from pipeline.views.erasing import erase
from pipeline.views.mixing import mix_batch

MAX_SKIPPED_IN_A_ROW = 5
log = logging.getLogger(__name__)


def train(me: Rank) -> None:
    """Train the run of `me.run` from its newest checkpoint, or from the start, to its last step. Collective."""
    log_to_stdout(me)
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
        engine = Engine(
            module, config, batches, precision=plan["precision"], compile_backend=plan.get("compile_backend")
        )
        if checkpoint is not None:
            load_checkpoint(engine.state, checkpoint)
            log.info("resumed at step %d from %s", first_step, checkpoint.directory)
        log_start(config, plan)

        # 3. Steps.
        me.phase = "train"
        if first_step < last_step:
            _train_steps(me, config, plan, engine, loader, supply, first_step, last_step)
    if me.is_first:
        write_json(me.run.result_file, result_of(me, config, plan))
        draw_reconstructions(me, config, module, sources.indexes[0])
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
    report, saver = Report(me, config, plan, first, last), Saver(me, config, plan, engine)
    recorder = SampleRecorder(me.attempt, me.rank, config.data.record)
    skipped_in_a_row = 0
    for step in range(first, last):
        me.step, started, done = step, time.perf_counter(), step + 1
        rate = _rate(config, plan, step)
        micro_batches = _micro_batches(me, config, engine, loader, supply, recorder)
        result = engine.step(micro_batches, rate, stop=me.stop_requested, counts=supply.counts)
        supply.add(result.sums)
        report.step(done, result, rate, supply, loader, time.perf_counter() - started)

        skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
        if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradient was not finite for {skipped_in_a_row} steps in a row, up to step {done}; "
                "lower optimizer.learning_rate, clip with optimizer.max_grad_norm, or try precision: fp32"
            )
        rehearsal_stop = plan.get("stop_after_step") == done and me.attempt.number == 1
        stopping = (result.stop or rehearsal_stop) and done < last
        if saver.is_due(done) or stopping:
            saver.save(done, supply)
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


def _rate(config: TrainingConfig, plan: dict, step: int) -> float:
    seen = (step + 1) * config.global_batch_size  # the rate of the end of the step: never zero
    return learning_rate(config.optimizer, seen, StepPlan(**plan["steps"]))


def _initialise(module: torch.nn.Module, config: TrainingConfig, plan: dict) -> None:
    source = plan["initialise_from"]
    try:
        grid = EncoderConfig.model_validate(source["encoder"]).grid if source["encoder"] else None
        report = load_encoder_weights(module.encoder, source_weights(source), head=False, grid=grid)
    except WeightsError as error:
        raise InputError(f"initialise_from {config.initialise_from}: {error}") from error
    log.info("initialised from %s: %s", config.initialise_from, report)
