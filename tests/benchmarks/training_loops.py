"""Training loops that take turns: ours, and those it is held against, each in a process that stays.

Every loop takes the same batch of uint8 images from the host again and again, and normalises it by the same function.
It draws its batches from an iterator that waits for its next turn on standard input, so a loop that owns its process
(ours, Hugging Face's Trainer) is measured as it is. The network is a ViT of width 64 and 4 blocks, 55 tensors, small
enough that what a loop adds to it can be seen. Two processes differ by more than that, so each loop is held against
bare steps on its own network and optimizer, which the iterator makes between the loop's own. The process is

    python -m tests.benchmarks.training_loops LOOP-STAGE WORKSPACE
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from models.build import build_objective
from models.objectives.batch import Batch
from pipeline.config.plan import BatchPlan, training_flops
from pipeline.config.training import PretrainConfig
from pipeline.loading.loader import RawBatch, to_device
from pipeline.ports import free_port
from pipeline.rank import Rank
from pipeline.run_directory import RunDirectory
from pipeline.training.optimizer import build_optimizer, parameter_groups

BATCH_SIZE, IMAGE_SIZE, CLASSES = 8, 32, 10
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
RATE, CLIP = 1e-3, 1.0
FOR_EVER = 1_000_000_000  # steps
FEW_STEPS = 4
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def micro_config(stage: int) -> PretrainConfig:
    return PretrainConfig.model_validate({
        "encoder": {"name": "vit_ti16", "image_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 64, "depth": 4,
                    "num_heads": 4, "positions": "sincos2d"},
        "objective": {"kind": "supervised"},
        "data": {"mean": MEAN, "std": STD},
        "optimizer": {"learning_rate": RATE, "max_grad_norm": CLIP},
        "zero": {"stage": stage}, "steps": FOR_EVER, "checkpoint": {"every_steps": FOR_EVER},
        "global_batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE,
    })  # fmt: skip


def micro_module(config: PretrainConfig) -> torch.nn.Module:
    return build_objective(config.objective, config.encoder, num_classes=CLASSES, seed=0)


def raw_batch() -> RawBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
    return RawBatch(images, labels, torch.arange(BATCH_SIZE), [str(number) for number in range(BATCH_SIZE)], [])


class NoMoreTurns(Exception):
    """Nobody asks for another; the loop ends as by any exception, what it has to tell told."""


class Turns:
    """Batches without end; between turns it answers what the last one cost and waits for the next.

    A line on standard input is the number of images that the loop is to take; the end of the input ends the process.
    Within each turn as many of the loop's `bare_step`, which it names before it draws, are made and timed, a few before
    and behind every few of the loop's own: where the machine grows slower or faster, both do.
    """

    images_per_second = None  # of a loader that was never waited for

    def __init__(self, answers: Any):
        self.answers, self.batch = answers, raw_batch()
        self.bare_step: Callable[[Batch], None]
        self._batches = self._iterate()

    def __iter__(self) -> "Turns":
        return self

    def __next__(self) -> RawBatch:
        return next(self._batches)

    def _iterate(self) -> Iterator[RawBatch]:
        for line in sys.stdin:
            steps = max(1, int(line) // BATCH_SIZE)
            yield self.batch  # one of each that does not count: what ran in between has emptied the caches
            self._bare_seconds(1)
            cpu, wall, bare = 0.0, 0.0, 0.0  # seconds; bare ones of CPU time
            for few in [FEW_STEPS] * (steps // FEW_STEPS) + [steps % FEW_STEPS]:
                bare += self._bare_seconds(few // 2)
                wall_began, began = time.perf_counter(), time.process_time()
                for _ in range(few):
                    yield self.batch
                cpu += time.process_time() - began
                wall += time.perf_counter() - wall_began
                bare += self._bare_seconds(few - few // 2)
            answer(self.answers, images=steps * BATCH_SIZE, cpu_seconds=cpu, wall_seconds=wall, bare_cpu_seconds=bare)
        raise NoMoreTurns  # the loop around this would go on for ever

    def _bare_seconds(self, steps: int) -> float:
        """CPU time of bare steps."""
        began = time.process_time()
        for _ in range(steps):
            self.bare_step(prepared(self.batch))
        return time.process_time() - began


def plain_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Batch], None]:
    """A step of plain PyTorch. It leaves no gradients, as the loops do: the step behind it would add to them."""
    parameters = list(module.parameters())

    def step(batch: Batch) -> None:
        module(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed_step(engine: Any) -> Callable[[Batch], None]:
    """A step of DeepSpeed's engine."""

    def step(batch: Batch) -> None:
        engine.backward(engine(batch).loss)
        engine.step()

    return step


def prepared(raw: RawBatch) -> Batch:
    return to_device(raw, torch.device("cpu"), MEAN, STD, torch.float32)


def ours(turns: Any, workspace: Path, stage: int) -> None:
    """The product's own loop, with its ledger, log and meters."""
    from pipeline.training.engine import Engine
    from pipeline.training.health import Health
    from pipeline.training.loop import train_steps
    from pipeline.training.report import log_to_stdout
    from pipeline.training.supply import Supply
    from pipeline.training.validation import Validation

    config, batches = micro_config(stage), BatchPlan(BATCH_SIZE, BATCH_SIZE, 1, 1)
    run = RunDirectory(workspace / f"run-{stage}")
    me = Rank(run, run.attempt(1).make(), rank=0, local_rank=0, world_size=1)
    log_to_stdout(me)
    steps = {"steps": FOR_EVER, "samples": FOR_EVER * BATCH_SIZE, "warmup_samples": 0}
    plan = {
        "batches": batches._asdict(), "steps": steps, "precision": "fp32", "loader_workers": 0, "nodes": 1,
        "training_flops_per_image": training_flops(config.encoder, config.objective, CLASSES),
    }  # fmt: skip
    engine = Engine(micro_module(config), config, batches, precision="fp32", enter=me.progress.enter)
    validation = Validation(me, config, plan, None, 0, FOR_EVER)  # none: there is no split
    health = Health(me, config, plan, None, 0, FOR_EVER)  # none: its config does not say when
    turns.bare_step = deepspeed_step(engine.wrapped) if stage else plain_step(engine.module, engine.optimizer)
    train_steps(me, config, plan, engine, turns, Supply(config, {}), validation, health, 0)


def accelerate(turns: Any, workspace: Path, stage: int) -> None:
    """The loop of accelerate's examples."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain = module_and_optimizer(micro_config(stage))
    turns.bare_step = plain_step(*plain)
    module, optimizer = accelerator.prepare(*plain)
    module.train()
    for raw in turns:
        with accelerator.accumulate(module):
            accelerator.backward(module(prepared(raw)).loss)
            accelerator.clip_grad_norm_(module.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()


def trainer(turns: Any, workspace: Path, stage: int) -> None:
    """Hugging Face's Trainer, which is given its batches ready made."""
    from transformers import Trainer, TrainingArguments

    class Wrapped(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def forward(self, images, labels, positions):
            return {"loss": self.module(Batch(images, labels, positions)).loss}

    class Fed(Trainer):
        def get_train_dataloader(self):
            return ({name: value for name, value in prepared(raw)._asdict().items() if name in names} for raw in turns)

    names = ("images", "labels", "positions")
    module, optimizer = module_and_optimizer(micro_config(stage))
    turns.bare_step = plain_step(module, optimizer)
    arguments = TrainingArguments(
        output_dir=str(workspace / "trainer"), use_cpu=True, max_steps=FOR_EVER, max_grad_norm=CLIP, report_to=[],
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=BATCH_SIZE,
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    Fed(Wrapped(module), arguments, optimizers=(optimizer, constant)).train()


def module_and_optimizer(config: PretrainConfig) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = micro_module(config)
    optimizer = build_optimizer(parameter_groups(module, config.optimizer, config.encoder.depth), config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    return module, optimizer


def answer(stream: Any, **content: object) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


def serve(name: str, workspace: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    os.environ |= ALONE | {"DS_ACCELERATOR": "cpu", "MASTER_PORT": str(free_port())}
    torch.set_num_threads(1)
    loop, _, stage = name.partition("-")
    try:
        globals()[loop](Turns(answers), workspace, int(stage))
    except NoMoreTurns:
        os._exit(0)
    except Exception as error:
        answer(answers, error=" ".join(f"{type(error).__name__}: {error}".split())[:200])
        raise


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
