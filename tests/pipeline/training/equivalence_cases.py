"""Twenty steps of a tiny ViT in one process of plain PyTorch, and through the real engine on ranks, setting by setting.

A setting is a config: stage, batches, precision, optimizer. One world of ranks trains many, one after the other.
"""

import math
import os
from typing import Any, NamedTuple

import torch

from models.objectives.batch import Batch, Progress
from pipeline.config import deepspeed
from pipeline.config.plan import StepPlan, plan_batches
from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.config.training import FinetuneConfig, PretrainConfig, TrainingConfig
from pipeline.training.engine import Engine
from pipeline.training.optimizer import build_optimizer, parameter_groups
from pipeline.training.schedule import Schedule
from pipeline.views.mixing import mix_batch
from tests.pipeline.training.engine_cases import CLASSES, module_of, save_state, saved_weights

STEPS, GLOBAL_BATCH, IMAGE_SIZE = 20, 32, 16


class Training(NamedTuple):
    """What a training leaves behind: one entry per step, and weights by name."""

    losses: list[float]
    norms: list[float]
    rates: list[list[float]]  # of every parameter group
    weights: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]


def setting(stage: int, *overrides: str) -> TrainingConfig:
    raw = {
        "encoder": {"name": "vit_ti16", "image_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 48, "depth": 2,
                    "num_heads": 3, "drop_path_rate": 0.2},
        "objective": {"kind": "supervised"},
        "optimizer": {"learning_rate": 5e-4, "warmup": 4, "max_grad_norm": 1.0},
        "zero": {"stage": stage}, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 8, "steps": STEPS,
        "ema_decay": 0.9, "precision": "fp32", "compile": False,
    }  # fmt: skip
    settings = parse_overrides(overrides)
    if settings.get("optimizer.kind", "adamw") == "adamw":
        settings["optimizer.eps"] = 1e-6  # with 1e-8 Adam normalises the rounding noise of gradients that are zero
    if "tuning.kind" in settings:
        return validate(FinetuneConfig, apply_overrides(raw | {"initialise_from": "x"}, settings), "setting")
    return validate(PretrainConfig, apply_overrides(raw, settings), "setting")


def batches_of(config: TrainingConfig, step: int, first: int, last: int, size: int) -> list[Batch]:
    """Samples [first, last) of the step's global batch, in batches of `size`: the same images whatever the split."""
    generator = torch.Generator().manual_seed(100 + step)
    total = config.global_batch_size
    images = torch.randn(total, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(CLASSES, (total,), generator=generator)
    positions = torch.arange(step * total, (step + 1) * total)
    parts = []
    for start in range(first, last, size):
        part = Batch(*(whole[start : start + size] for whole in (images, labels, positions)))
        if config.augmentation.mixes:
            part = mix_batch(part, part.positions.numpy(), config.augmentation, config.seed)
        parts.append(part)
    return parts


def rate_of(config: TrainingConfig, step: int) -> float:
    seen, per_step = (step + 1) * config.global_batch_size, config.global_batch_size
    plan = StepPlan(config.steps * per_step, config.steps, int(config.optimizer.warmup) * per_step)
    return Schedule(config.optimizer, plan).rate(seen)


def train_plainly(config: TrainingConfig) -> Training:
    """One process, plain PyTorch, the whole global batch at once."""
    module = module_of(config)
    optimizer = build_optimizer(parameter_groups(module, config.optimizer, config.encoder.depth), config.optimizer)
    for group in optimizer.param_groups:
        group["fused"] = False  # torch's plain loop over tensors
    average = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses, norms, rates = [], [], []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_of(config, step) * group["learning_rate_scale"]
        module.train()
        outcome = module(batches_of(config, step, 0, config.global_batch_size, config.global_batch_size)[0])
        optimizer.zero_grad()
        outcome.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.max_grad_norm or math.inf)
        ranks = getattr(module, "ranks", None)
        if ranks is not None:
            ranks.observe((step + 1) / config.steps)
        optimizer.step()
        if ranks is not None:
            ranks.allocate((step + 1) / config.steps)
        for name, weight in module.named_parameters():
            average[name].lerp_(weight.detach(), 1 - config.ema_decay)
        losses.append(outcome.loss.item())
        norms.append(norm.item())
        rates.append(sorted({group["lr"] for group in optimizer.param_groups}))
    return Training(losses, norms, rates, {name: p.detach().clone() for name, p in module.named_parameters()}, average)


def train_on_ranks(settings: dict[str, TrainingConfig], folder: str) -> dict[str, tuple[Any, ...]]:
    """(losses, norms, rates) of every setting on this world; the last states are saved under `folder/NAME`."""
    deepspeed.STAGE_3_RESIDENT_ELEMENTS = 0  # or a network this small would never be partitioned
    deepspeed.REDUCE_BUCKET_ELEMENTS = 30_000  # and its gradients would fit into one bucket
    by_stage = sorted(settings.items(), key=lambda item: item[1].zero.stage)  # accelerate never leaves DeepSpeed again
    return {name: _train(config, f"{folder}/{name}") for name, config in by_stage}


def _train(config: TrainingConfig, folder: str) -> tuple[Any, ...]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch._dynamo.reset()
    engine = Engine(
        module_of(config), config, plan_batches(config.global_batch_size, config.micro_batch_size, world_size),
        precision=config.precision, compile_backend="aot_eager" if config.compile else None,
    )  # fmt: skip
    losses, norms, rates = [], [], []
    share = config.global_batch_size // world_size
    for step in range(config.steps):
        parts = batches_of(config, step, rank * share, (rank + 1) * share, config.micro_batch_size)
        parts = [part._replace(images=part.images.to(engine.compute_dtype)) for part in parts]
        result = engine.step(parts, rate_of(config, step), stop=False, progress=Progress((step + 1) / config.steps, 0))
        assert not result.skipped
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        rates.append(sorted({group["lr"] for group in engine.state.base.param_groups}))
        assert all(p.grad is None for p in engine.module.parameters() if not p.requires_grad)
    save_state(engine, folder, config.steps)
    return losses, norms, rates


def collected(results: dict[str, tuple[Any, ...]], folder: str) -> dict[str, Training]:
    """What the ranks said, with the weights that they saved."""
    return {
        name: Training(*trace, saved_weights(f"{folder}/{name}"), saved_weights(f"{folder}/{name}", average=True))
        for name, trace in results.items()
    }
