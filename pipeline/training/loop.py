"""The training loop of pretraining and fine-tuning: straight code, whichever the objective and the backend."""

import logging
from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch

from models.build import build_objective
from models.encoders.timm_config import read_encoder
from models.objectives.batch import Batch, Progress
from models.objectives.teacher import Teacher
from models.tuning.place import tune
from models.weights.loading import WeightsError, load_beside_encoder, load_encoder_weights
from pipeline.budget import Budget
from pipeline.checkpoints.checkpoint import load_checkpoint, load_frozen
from pipeline.checkpoints.resuming import newest_intact_checkpoint
from pipeline.checkpoints.retention import require_room
from pipeline.config.plan import BatchPlan, StepPlan
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import HealthError, InputError
from pipeline.loading.loader import Loader, RawBatch, to_device
from pipeline.loading.stream import SampleStream
from pipeline.meeting import open_store, stop_together
from pipeline.rank import Rank, Stopped
from pipeline.registry.locate import different_classes
from pipeline.registry.weights import load_teacher, source_weights
from pipeline.run_directory import write_json
from pipeline.shards.index import read_index
from pipeline.shards.label_sets import LabelSets
from pipeline.telemetry.ledger import SampleRecorder
from pipeline.telemetry.profiling import StepTrace
from pipeline.training.agreement import open_agreed_sources
from pipeline.training.engine import Engine
from pipeline.training.guard import Guard
from pipeline.training.health import Health
from pipeline.training.reconstructions import draw_reconstructions
from pipeline.training.report import Report, log_start, log_to_stdout, result_of
from pipeline.training.roll_back import roll_back
from pipeline.training.saving import Saver
from pipeline.training.schedule import Schedule
from pipeline.training.supply import Supply
from pipeline.training.validation import Validation
from pipeline.views.erasing import erase
from pipeline.views.mixing import mix_batch

log = logging.getLogger(__name__)


def train(me: Rank) -> None:
    """Train the run of `me.run` from its newest checkpoint, or from the start, to its last step. Collective."""
    log_to_stdout(me)
    config, plan = read_run_config(me.run.path), me.run.plan()
    log_start(config, plan)
    batches = BatchPlan(**plan["batches"])
    require_room(
        me.run, config.checkpoint, plan["checkpoint_bytes"], 4 * plan["parameters"], config.validation.best_metric
    )

    # 1. Data: a pure function of the position, so resuming is a seek. Workers read ahead while the model is made.
    me.phase = "data"
    store = open_store(me)
    sources = open_agreed_sources(me, store, config.data, plan)
    stop_together(me, store)
    checkpoint = newest_intact_checkpoint(me, store, config.checkpoint.mirror)
    first_step, last_step = checkpoint.step if checkpoint else 0, plan["steps"]["steps"]
    supply = Supply(
        config, checkpoint.manifest if checkpoint else {}, [window.positions for window in me.run.rolled_back()],
        sources.tombstones,
    )  # fmt: skip
    with Loader(
        SampleStream(config, sources.indexes), batches, rank=me.rank, first_step=first_step, last_step=last_step,
        workers=plan["loader_workers"], skipped=supply.skipped, ranks_per_node=plan["ranks_per_node"],
    ) as loader, Validation(me, config, plan, sources, first_step, last_step) as validation, Health(
        me, config, plan, sources, first_step, last_step
    ) as health:  # fmt: skip
        # 2. Model: its weights are (a) those of this run's newest checkpoint, else (b) another model's, else (c) the
        # seed's.
        me.phase = "model"
        module = initial_module(config, plan, resumes=checkpoint is not None)
        if checkpoint is not None:
            load_frozen(module, checkpoint)
        engine = Engine(
            module, config, batches, precision=plan["precision"], compile_backend=plan.get("compile_backend"),
            enter=me.progress.enter,
        )  # fmt: skip
        if checkpoint is not None:
            load_checkpoint(engine.state, checkpoint)
            log.info("resumed at step %d from %s", first_step, checkpoint.directory)
        stop_together(me, store)

        # 3. Steps, to the last.
        train_steps(me, config, plan, engine, loader, supply, validation, health, first_step)
    me.phase = "finish"
    if me.is_first:
        write_json(me.run.result_file, result_of(me, config, plan))
        draw_reconstructions(me, config, module, sources.indexes[0])
    del store  # rank 0 served it to the last


def train_steps(
    me: Rank, config: TrainingConfig, plan: dict, engine: Engine, loader: Loader, supply: Supply,
    validation: Validation, health: Health, step: int,
) -> None:  # fmt: skip
    """The steps from `step` on. All ranks leave together: behind the last, or by Stopped with a checkpoint."""
    lengths = StepPlan(**plan["steps"])
    saver = Saver(me, config, plan, engine, best=config.validation.best_metric)
    if step >= lengths.steps:  # killed behind its last checkpoint
        return
    guard = Guard(config.guard, plan["precision"], len(supply.rolled_back))
    recorder = SampleRecorder(me.attempt, me.rank) if config.data.record else None
    budget = Budget.of(me.run, me.attempt, config.budget_gpu_hours, me.world_size)
    schedule, images_per_step = Schedule(config.optimizer, lengths), config.global_batch_size
    batches = micro_batches(me, config, engine, loader, supply, recorder)
    accumulated = engine.plan.gradient_accumulation_steps
    rehearsed_stop = plan.get("stop_after_step") if me.attempt.number == 1 else None
    me.phase = "train"
    with Report(me, config, plan, engine, step, lengths.steps) as report, StepTrace(me, config.profiling) as trace:
        while step < lengths.steps:
            me.step, done = step, step + 1
            if trace.steps:
                trace.before(done)
            report.meter.begin()

            # Read, augment and learn, one micro-batch after the other; then update the weights.
            rate = schedule.rate(done * images_per_step)
            stop = me.stop_requested or budget.is_spent
            result = engine.step(
                islice(batches, accumulated), rate, stop=stop, counts=lambda: {**supply.counts(), **saver.counts()},
                progress=progress_of_step(lengths, step),
            )  # fmt: skip
            supply.add(result.sums)
            saver.follow(result.sums)
            report.meter.end(supply.seconds_waited(), engine.clock.take())

            # Validate, measure its health, and report.
            scores, measured = validation.scores(engine, done), health.measure(engine, done)
            report.step(done, result, rate, supply, loader, scores | measured.scores)
            if trace.steps:
                trace.after(done, lengths.steps)

            # After too many bad steps in a row go on from before them, without their samples.
            if (bad := guard.judge(step, result)) is not None:
                me.phase = "roll back"
                saver.finish()
                step = roll_back(me, bad, engine, loader, supply, partial(initial_module, config, plan))
                if measured.reason is not None:
                    raise HealthError(health.last_words(measured.reason, step))
                health.count_until(step)
                me.phase = "train"
                continue

            # Save when it is time, what was scored, and before stopping.
            stopping = done < lengths.steps and (result.stop or done == rehearsed_stop)
            due = saver.is_due(done) or bool(scores)
            unhealthy = measured.reason is not None
            if (due and not guard.in_doubt) or stopping or unhealthy or done == lengths.steps:
                report.flush()
                saver.save(done, supply, validation=scores, wait=stopping or unhealthy)
            if unhealthy:
                raise HealthError(health.last_words(measured.reason, done))
            if stopping:
                raise Stopped(f"{budget.why_stopped} at step {done} of {lengths.steps}, checkpoint complete")
            step = done


def micro_batches(
    me: Rank, config: TrainingConfig, engine: Engine, loader: Loader, supply: Supply, recorder: SampleRecorder | None
) -> Iterator[Batch]:
    """Of one step after the other, each drawn when the one before has been used: normalised, erased and mixed on the
    device.
    """
    data, augmentation, seed = config.data, config.augmentation, config.seed
    mean, deviation, erases, mixes = data.mean, data.std, bool(augmentation.erase_probability), augmentation.mixes

    def prepared(raw: RawBatch) -> Batch:
        batch = to_device(raw, engine.device, mean, deviation, engine.compute_dtype)
        if erases:
            batch = erase(batch, raw.positions.numpy(), augmentation, seed)
        if mixes:
            batch = mix_batch(batch, raw.positions.numpy(), augmentation, seed)
        return batch

    while True:
        raw = supply.draw(loader)
        if recorder is not None:
            recorder.write(me.step, raw.positions, raw.keys)
        yield prepared(raw)  # kept nowhere here: it would be there still when the next one is made


def progress_of_step(steps: StepPlan, step: int) -> Progress:
    return Progress((step + 1) / steps.steps, steps.warmup_samples / steps.samples)


def initial_module(config: TrainingConfig, plan: dict, *, resumes: bool = False) -> torch.nn.Module:
    """The module with the weights that the run begins with; of one that `resumes` only the seed's."""
    module = build_objective(
        config.objective, config.encoder, num_classes=plan["num_classes"], seed=config.seed,
        mean=config.data.mean, std=config.data.std, teacher=_teacher(config, plan),
        label_sets=_label_sets(config, plan),
    )  # fmt: skip
    if not resumes and config.initialise_from is not None:
        _initialise(module, config, plan)
    tune(module, config.tuning, config.seed)
    return module


def _teacher(config: TrainingConfig, plan: dict) -> Teacher | None:
    """The trained model that the run learns from, where it does; InputError where its classes are not the dataset's."""
    source = plan.get("teacher")
    if source is None:
        return None
    teacher = load_teacher(source, mean=config.data.mean, std=config.data.std)
    if config.objective.reads_labels and teacher.num_classes != plan["num_classes"]:
        raise InputError(different_classes(source["reference"], teacher.num_classes, plan["num_classes"]))
    return teacher


def _label_sets(config: TrainingConfig, plan: dict) -> LabelSets | None:
    """By label, the classes that it stands for, where the run learns several of an image."""
    if not (config.objective.reads_labels and plan["data"].get("has_label_sets")):
        return None
    return read_index(config.data.sources[0].path).label_sets


def _initialise(module: torch.nn.Module, config: TrainingConfig, plan: dict) -> None:
    source = plan["initialise_from"]
    try:
        grid = getattr(read_encoder(source["encoder"]), "grid", None) if source["encoder"] else None
        weights = source_weights(source)
        report = load_encoder_weights(module.encoder, weights, head=False, grid=grid)
    except WeightsError as error:
        raise InputError(f"initialise_from {config.initialise_from}: {error}") from error
    if config.tuning.freezes:
        _require_learned(module, config, report.missing)
    log.info("initialised from %s: %s", config.initialise_from, report)
    if (source["kind"], source["objective"]) == ("checkpoint", config.objective.kind) and config.stage == "pretrain":
        log.info("%s", load_beside_encoder(module, weights))


def _require_learned(module: torch.nn.Module, config: TrainingConfig, missing: tuple[str, ...]) -> None:
    """InputError where a frozen encoder would keep what the seed drew: a norm that is fresh changes nothing."""
    drawn = {name for name, parameter in module.encoder.named_parameters() if parameter.requires_grad}
    if found := [name for name in missing if name in drawn and not name.startswith(("norm.", "fc_norm."))]:
        raise InputError(
            f"tuning.kind {config.tuning.kind}: initialise_from {config.initialise_from} lacks {len(found)} tensors of "
            f"the encoder ({found[0]}), and frozen they would stay as the seed drew them; set encoder.* as the model "
            "has it, or tuning.kind to full"
        )
