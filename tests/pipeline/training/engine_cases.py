"""What the engine's tests run on ranks: a tiny ViT, the same global batches whatever the world, and the real engine."""

import math
import os
from pathlib import Path

import torch

from models.build import build_objective
from models.objectives.batch import Batch, Outcome
from models.tuning.place import tune
from pipeline.checkpoints.checkpoint import commit, load_checkpoint, partial_directory, write_share
from pipeline.checkpoints.files import read_weights
from pipeline.checkpoints.snapshot import Snapshot
from pipeline.config import deepspeed
from pipeline.config.plan import plan_batches
from pipeline.config.training import PretrainConfig
from pipeline.run_directory import RunDirectory, verified_manifest, write_json
from pipeline.training.engine import Engine
from pipeline.training.optimizer import build_optimizer, parameter_groups

GLOBAL_BATCH, PEAK_RATE, CLASSES = 8, 1e-3, 5


def config_of(
    stage: int, *, micro_batch: int, clip: float = 1.0, ema: float = 0.9, layer_decay: float = 1.0
) -> PretrainConfig:
    return PretrainConfig.model_validate({
        "encoder": {"name": "vit_ti16", "image_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3,
                    "drop_path_rate": 0.2},
        "objective": {"kind": "supervised"},
        "optimizer": {"learning_rate": PEAK_RATE, "eps": 1e-6, "max_grad_norm": clip, "layer_decay": layer_decay},
        "zero": {"stage": stage}, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": micro_batch, "steps": 10,
        "ema_decay": ema,
    })  # fmt: skip


def global_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
    labels = torch.randint(CLASSES, (GLOBAL_BATCH,), generator=generator)
    return Batch(images, labels, torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))


def rate_of(step: int) -> float:
    return PEAK_RATE * (step + 1) / 10


def module_of(config: PretrainConfig) -> torch.nn.Module:
    module = build_objective(config.objective, config.encoder, num_classes=CLASSES, seed=0)
    torch.manual_seed(1)
    torch.nn.init.normal_(module.encoder.get_classifier().weight, std=0.02)
    tune(module, config.tuning, seed=2)
    return module


def train_plainly(config: PretrainConfig, steps: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The reference: one process, plain PyTorch, the whole global batch at once."""
    module = module_of(config)
    optimizer = build_optimizer(parameter_groups(module, config.optimizer, config.encoder.depth), config.optimizer)
    for group in optimizer.param_groups:
        group["fused"] = False  # torch's plain loop over tensors
    trace = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(step) * group["learning_rate_scale"]
        module.train()
        outcome = module(global_batch(step))
        optimizer.zero_grad()
        outcome.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.max_grad_norm or math.inf)
        optimizer.step()
        trace.append((outcome.loss.item(), norm.item()))
    return trace, {name: p.detach().clone() for name, p in module.named_parameters()}


def train_on_engine(
    config: PretrainConfig, steps: int, folder: str, *, resume_from: str | None = None, poison_step: int = -1
) -> list[tuple[float, float, bool]]:
    """(loss, gradient norm, skipped) of each step of this world; the last state is saved under `folder`."""
    deepspeed.STAGE_3_RESIDENT_ELEMENTS = 0  # or a network this small would never be partitioned
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    module, plan = module_of(config), plan_batches(GLOBAL_BATCH, config.micro_batch_size, world_size)
    engine = Engine(module, config, plan, precision="fp32")
    trace, first = [], 0
    if resume_from is not None:
        checkpoint = RunDirectory(resume_from).newest_checkpoint()
        load_checkpoint(engine.state, checkpoint)
        first = checkpoint.step
    share = GLOBAL_BATCH // world_size
    for step in range(first, steps):
        whole = global_batch(step)
        mine = [Batch(*(None if t is None else t[rank * share : (rank + 1) * share] for t in whole))]
        parts = [
            Batch(*(None if t is None else t[i : i + config.micro_batch_size] for t in mine[0]))
            for i in range(0, share, config.micro_batch_size)
        ]
        hook = module.register_forward_hook(_poison) if step == poison_step and rank == 0 else None
        result = engine.step(parts, rate_of(step), stop=False)
        if hook is not None:
            hook.remove()
        trace.append((result.loss, result.gradient_norm, result.skipped))
    save_state(engine, folder, steps)
    return trace


def _poison(module: torch.nn.Module, arguments: tuple, outcome: Outcome) -> Outcome:
    """A loss that is not finite, of which every gradient is."""
    return outcome._replace(loss=outcome.loss + math.inf)


def save_state(engine: Engine, folder: str, step: int) -> None:
    """The state as a checkpoint of a run `folder` that has no more than that. Collective."""
    run, rank, world_size = RunDirectory(folder), engine.rank, engine.plan.world_size
    if rank == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(run.job_file, {"attempt": 1})
    snapshot = Snapshot(engine.state, rank, world_size)
    snapshot.lend()
    write_share(snapshot, engine.frozen, partial_directory(run, run.attempt(1), step))
    engine.accelerator.wait_for_everyone()
    if rank == 0:
        commit(run, run.attempt(1), engine.state, world_size, {"step": step, "ema": False})
    engine.accelerator.wait_for_everyone()


def saved_weights(folder: str, *, average: bool = False) -> dict[str, torch.Tensor]:
    checkpoint = RunDirectory(folder).newest_checkpoint()
    assert verified_manifest(checkpoint.directory)
    if average:
        checkpoint.manifest["ema"] = True
    return read_weights(checkpoint)
