"""One step of a run again, from the nearest checkpoint at or before it, with the loss and gradient of every sample.

At any world size, as the step's samples and their randomness are a function of their positions. Nothing is written.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist

from models.objectives.batch import Batch
from pipeline.checkpoints.checkpoint import load_checkpoint, load_frozen
from pipeline.checkpoints.identity import require_own
from pipeline.config.plan import StepPlan, plan_batches
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import InputError
from pipeline.loading.loader import Loader
from pipeline.loading.sources import open_sources
from pipeline.loading.stream import SampleStream
from pipeline.rank import Rank
from pipeline.run_directory import Checkpoint, RunDirectory
from pipeline.training.agreement import require_planned_data
from pipeline.training.engine import Engine, StepResult
from pipeline.training.loop import initial_module, micro_batches, progress_of_step
from pipeline.training.schedule import Schedule
from pipeline.training.supply import Supply


class SampleResult(NamedTuple):
    """What one sample of the step gave by itself."""

    position: int
    key: str
    loss: float
    gradient_norm: float

    @property
    def badness(self) -> tuple[bool, float]:
        finite = math.isfinite(self.loss) and math.isfinite(self.gradient_norm)
        return not finite, self.loss if finite else 0.0


class Replayed(NamedTuple):
    """A step again: its result, which does not depend on the world, and all its samples, the worst first."""

    begun_at: int
    result: StepResult
    samples: list[SampleResult]
    recorded: dict[str, float]  # the ledger's line of the step


def replay(run: RunDirectory, number: int) -> Replayed:
    """Repeat the step that the ledger calls `number`, the first being 1; computed as plain data parallel. Collective.

    InputError for a step that the run does not have.
    """
    config, plan, step = read_run_config(run.path), run.plan(), number - 1
    _require_step(run, config, plan, number)
    checkpoint, passed_over, rolled_back = _before(run, step)
    begin = checkpoint.step if checkpoint else 0

    config = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": 0})})
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    me = Rank(run, run.attempt(run.last_attempt()), rank, local_rank, world_size)
    batches = plan_batches(config.global_batch_size, config.micro_batch_size, world_size)
    sources = open_sources(config.data)
    require_planned_data(sources, plan)
    supply = Supply(config, checkpoint.manifest if checkpoint else {}, passed_over)
    with Loader(
        SampleStream(config, sources.indexes), batches, rank=rank, first_step=begin, last_step=number,
        workers=plan["loader_workers"], skipped=supply.skipped, ranks_per_node=world_size,
    ) as loader:  # fmt: skip
        module = initial_module(config, plan, resumes=checkpoint is not None)
        if checkpoint is not None:
            require_own(checkpoint.manifest, run, checkpoint.directory)
            load_frozen(module, checkpoint)
        engine = Engine(module, config, batches, precision=plan["precision"])
        if checkpoint is not None:
            load_checkpoint(engine.state, checkpoint)
        samples: list[SampleResult] = []
        lengths = StepPlan(**plan["steps"])
        schedule = Schedule(config.optimizer, lengths)
        drawn = micro_batches(me, config, engine, loader, supply, None)
        for me.step in range(begin, number):
            given = islice(drawn, batches.gradient_accumulation_steps)
            if me.step == step:
                given = _told(given, engine, module, loader, samples)
            rate = schedule.rate((me.step + 1) * config.global_batch_size)
            result = engine.step(given, rate, stop=False, progress=progress_of_step(lengths, me.step))
    samples = sorted(_of_all_ranks(samples), key=lambda sample: sample.badness, reverse=True)
    return Replayed(begin, result, samples, _ledger_line(run, number, first=rolled_back))


def _require_step(run: RunDirectory, config: object, plan: dict, number: int) -> None:
    if not isinstance(config, TrainingConfig):
        raise InputError(f"{run.path}: a run of stage {plan['stage']} has no steps; name a training run")
    if not 1 <= number <= plan["steps"]["steps"]:
        raise InputError(f"STEP {number}: {run.path} has steps 1 to {plan['steps']['steps']}")
    newest = run.newest_checkpoint()
    made = max([newest.step if newest else 0, *(line["step"] for line in _ledger_lines(run))])
    if number > made:
        raise InputError(f"STEP {number}: {run.path} has made {made} steps so far")


def _before(run: RunDirectory, step: int) -> tuple[Checkpoint | None, list[tuple[int, int]], bool]:
    """The checkpoint to begin from, the ranges passed over by then, and whether the step was rolled back.

    One that was is repeated as it was then, not as what came in its place.
    """
    windows, latest = run.rolled_back(), step
    covering = [i for i, window in enumerate(windows) if window.first_step <= step <= window.last_step]
    if covering:
        latest, windows = windows[covering[-1]].first_step, windows[: covering[-1]]
    checkpoint = next((one for one in run.committed_checkpoints() if one.step <= latest), None)
    return checkpoint, [window.positions for window in windows], bool(covering)


def _told(
    batches: Iterator[Batch], engine: Engine, module: torch.nn.Module, loader: Loader, samples: list[SampleResult]
) -> Iterator[Batch]:
    """The micro-batches of the step, each told of in `samples` before it is used: nothing has changed yet."""
    for batch in batches:
        samples += _samples(engine, module, batch, loader)
        yield batch


def _samples(engine: Engine, module: torch.nn.Module, batch: Batch, loader: Loader) -> list[SampleResult]:
    """Each sample of a micro-batch by itself: mixed images stay mixed, and no gradient is left behind."""
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    results = []
    for row, key in enumerate(loader.stream.keys(batch.positions.cpu().numpy())):
        one = Batch(*(None if part is None else part[row : row + 1] for part in batch))
        with engine.accelerator.autocast():
            loss = module(one).loss
        gradients = [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())
        results.append(SampleResult(int(batch.positions[row]), key, loss.item(), norm.item()))
    return results


def _of_all_ranks(samples: list[SampleResult]) -> list[SampleResult]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return samples
    gathered: list[list[SampleResult]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, samples)
    return [sample for part in gathered for sample in part]


def _ledger_line(run: RunDirectory, number: int, *, first: bool) -> dict[str, float]:
    """What the ledger says of the step: the last time it was made, or the first."""
    found = [line for line in _ledger_lines(run) if line["step"] == number]
    return found[0 if first else -1] if found else {}


def _ledger_lines(run: RunDirectory) -> list[dict[str, float]]:
    """Of all attempts, in the order they were written."""
    ledgers = [run.attempt(number).ledger for number in range(1, run.last_attempt() + 1)]
    return [json.loads(line) for ledger in ledgers if ledger.is_file() for line in ledger.read_text().splitlines()]


def report(run: RunDirectory, number: int) -> None:
    """Replay a step and tell of it on standard output. Rank 0 tells."""
    replayed = replay(run, number)
    if os.environ["RANK"] != "0":
        return
    then = replayed.recorded
    recorded = [f"{then[key]:.6g}" if key in then else "nothing" for key in ("train/loss", "train/gradient_norm")]
    lines = [
        f"step {number} of {run.path}, from step {replayed.begun_at}, world size {os.environ['WORLD_SIZE']}",
        f"loss           {replayed.result.loss:.6g}  (the ledger says {recorded[0]})",
        f"gradient norm  {replayed.result.gradient_norm:.6g}  (the ledger says {recorded[1]})",
        "    position        loss  gradient norm  key",
        *(f"{s.position:12d}  {s.loss:10.5g}  {s.gradient_norm:13.5g}  {s.key}" for s in replayed.samples),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
