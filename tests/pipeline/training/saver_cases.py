"""What the tests of saving run on ranks: the real engine and saver, and faults put into the writing of one rank."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch

from models.objectives.batch import Batch
from pipeline.checkpoints.snapshot import Snapshot
from pipeline.config.plan import StepPlan, plan_batches
from pipeline.errors import FaultError
from pipeline.rank import Rank
from pipeline.run_directory import RunDirectory, write_json
from pipeline.training import saving
from pipeline.training.engine import Engine
from pipeline.training.supply import Supply
from tests.pipeline.training.engine_cases import GLOBAL_BATCH, config_of, global_batch, module_of

LAST = 100


class Training:
    """Steps of the tiny ViT with a saver, as the loop makes them."""

    def __init__(self, folder: str, *, attempt: int = 1, stage: int = 1, **checkpoint):
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        run = RunDirectory(folder)
        self.me = Rank(run, run.attempt(attempt), self.rank, self.rank, self.world_size)
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            write_json(run.job_file, {"attempt": attempt})
        changes = {"checkpoint": {"every_steps": LAST} | checkpoint}
        config = config_of(stage, micro_batch=4)
        self.config = type(config).model_validate(config.model_dump() | changes)
        plan = plan_batches(GLOBAL_BATCH, 4, self.world_size)
        self.engine = Engine(module_of(self.config), self.config, plan, precision="fp32")
        self.supply, self.done = Supply(self.config, {}), 0
        facts = {
            "steps": StepPlan(LAST * GLOBAL_BATCH, LAST, 0)._asdict(),
            "nodes": 1,
            "num_classes": 5,
            "data": {"fingerprint": ""},
            "config_sha256": "",
        }
        self.new_saver = lambda **options: saving.Saver(self.me, self.config, facts, self.engine, **options)
        self.saver = self.new_saver()

    def own_batch(self, step: int) -> Batch:
        share = GLOBAL_BATCH // self.world_size
        rows = slice(self.rank * share, (self.rank + 1) * share)
        return Batch(*(None if tensor is None else tensor[rows] for tensor in global_batch(step)))

    def steps(self, count: int = 1) -> None:
        for _ in range(count):
            mine = self.own_batch(self.done)
            counts = lambda: self.supply.counts() | self.saver.counts()  # noqa: E731
            result = self.engine.step([mine], 1e-3, stop=False, counts=counts)
            self.done += 1
            self.saver.follow(result.sums)

    def save(self, **options) -> None:
        self.saver.save(self.done, self.supply, **options)

    def state(self) -> dict[str, list[torch.Tensor]]:
        return {kind: [flat.clone() for flat in flats] for kind, flats in self.engine.state.tensors().items()}


@contextmanager
def writing(instead: Callable[..., None]):
    """`instead(original, *arguments)` takes the place of the writing of this rank's share."""
    original = saving.write_share
    saving.write_share = lambda *arguments: instead(original, *arguments)
    try:
        yield
    finally:
        saving.write_share = original


def train_while_writing(folder: str) -> dict[str, object]:
    """A slow disk, a full one, and a cut-off attempt, one after the other in one world; what each left behind."""
    training, found = Training(folder), {}
    run, gate = training.me.run, threading.Event()

    def slowly(original, *arguments):
        assert gate.wait(60)
        original(*arguments)

    def onto_a_full_disk(original, *arguments):
        if training.rank == 1:
            raise FaultError(f"/data/rank-1: cannot be written: {os.strerror(errno.ENOSPC)}")
        original(*arguments)

    training.steps(2)
    before = training.state()
    with writing(slowly):
        training.save()
        training.steps(3)  # training goes on while nothing is written
        training.supply.damaged["cut"] += 1
        found["while writing"] = len(run.committed_checkpoints())
        gate.set()
        training.saver.finish()
    checkpoint = run.newest_checkpoint()
    found["saved"], found["damaged"] = checkpoint.step, checkpoint.manifest["damaged"]["cut"]
    found["unlike the state that was saved"] = max_difference(training, checkpoint, before)
    with writing(onto_a_full_disk):
        training.save()
        try:
            for _ in range(20):
                training.steps()
                training.saver._thread.submit(int).result()  # behind the write
            found["full disk"] = "no error"
        except FaultError as error:
            found["full disk"], found["known after steps"] = str(error), training.done - 5
    training.saver = training.new_saver()
    if training.rank == 0:
        write_json(run.job_file, {"attempt": 2})
    try:
        training.save(wait=True)
        found["cut-off attempt"] = "no error"
    except FaultError as error:
        found["cut-off attempt"] = str(error)
    found["newest"] = run.newest_checkpoint().step
    return found


def save_before_the_last_is_written(folder: str) -> tuple[float, list[float]]:
    """Seconds that the second of two saves took, which had to wait for the first; and what was said of each."""
    training, stalls = Training(folder), []
    training.saver._cadence.measured = lambda stall_seconds, seconds: stalls.append(stall_seconds)

    def slowly(original, *arguments):
        time.sleep(0.5)
        original(*arguments)

    with writing(slowly):
        training.steps()
        training.save()
        training.steps()
        began = time.perf_counter()
        training.save()
        seconds = time.perf_counter() - began
        training.saver.finish()
    return seconds, stalls


def change_while_copying(folder: str, stage: int) -> dict[str, object]:
    """A step, then a validation by the moving average, each begun before a slow copy of the state is through."""
    training, found = Training(folder, stage=stage), {}
    batch = training.own_batch(0)
    copy = Snapshot._copy_on_host

    def slowly(snapshot):
        time.sleep(0.5)
        copy(snapshot)

    training.steps(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshot, "_copy_on_host", slowly)
        for change in ("step", "validation"):
            before = training.state()
            began = time.perf_counter()
            training.save()
            found[f"{change}, save"] = time.perf_counter() - began
            if change == "step":
                training.steps()
            else:
                training.engine.evaluate([(batch, torch.ones(len(batch.images), dtype=torch.bool))])
            found[f"{change}, waited"] = training.saver._snapshot.seconds_waited()
            training.saver.finish()
            found[change] = max_difference(training, training.me.run.newest_checkpoint(), before)
    return found


def max_difference(training: Training, checkpoint, expected: dict[str, list[torch.Tensor]]) -> float:
    """Of the fragments that a checkpoint has for this rank from those in `expected`."""
    from pipeline.checkpoints.files import StoredFragments
    from pipeline.checkpoints.reading import read_parts

    stored, differences = StoredFragments(checkpoint), [0.0]
    for fragment in training.engine.state.fragments:
        for kind in ("fp32", "exp_avg", "exp_avg_sq", "ema"):
            target = torch.empty(fragment.count)
            read_parts(stored.parts(fragment.name, kind, fragment.start, target))
            there = expected[kind][fragment.flat].narrow(0, fragment.offset, fragment.count)
            differences.append((target - there).abs().max().item())
    return max(differences)


def die_before_the_commit(folder: str) -> None:
    """Rank 1 is killed when both have written their second checkpoint and rank 0 has not committed it."""
    training = Training(folder)
    training.steps()
    training.save(wait=True)
    training.steps()
    training.save()
    training.saver._task.result()
    torch.distributed.barrier()
    os.kill(os.getpid(), signal.SIGKILL)
