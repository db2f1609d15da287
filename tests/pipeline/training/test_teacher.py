"""A teacher that is the moving average of the weights: on real ranks, against a literal average and optimizers of old.

The objective is capi. Its clusters are balanced over all ranks, so one process with the whole batch is the reference.
"""

import os

import numpy as np
import pytest
import torch

from models.build import build_objective
from models.objectives.batch import Batch, Progress
from models.objectives.capi import Capi
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.config import deepspeed
from pipeline.config.plan import plan_batches
from pipeline.config.training import PretrainConfig
from pipeline.run_directory import RunDirectory
from pipeline.training.engine import Engine
from tests.pipeline.training.engine_cases import save_state, saved_weights
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow
STEPS, STOP, BATCH, RATE, DECAY = 4, 2, 8, 5e-4, 0.1
WARM = Progress(0.3, 0.2)


def config_of(stage: int, *, micro: int) -> PretrainConfig:
    return PretrainConfig.model_validate({
        "encoder": {"name": "vit_ti16", "image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
                    "drop_path_rate": 0.2},
        "objective": {"kind": "capi", "num_prototypes": 32, "predictor_depth": 2, "predictor_drop_path": 0.2,
                      "teacher_momentum": 0.6},
        "optimizer": {"learning_rate": RATE, "eps": 1e-6, "weight_decay": DECAY},
        "zero": {"stage": stage}, "global_batch_size": BATCH, "micro_batch_size": micro, "steps": STEPS,
    })  # fmt: skip


def module_of(config: PretrainConfig, seed: int = 0) -> Capi:
    return build_objective(config.objective, config.encoder, num_classes=0, seed=seed)


def batch_of(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    positions = torch.arange(step * BATCH, (step + 1) * BATCH)[share]
    return Batch(images[share], torch.full_like(positions, -1), positions)


def train_literally() -> tuple[list[float], dict, dict]:
    """One process: optimizers of the student and of the clustering head, a teacher updated parameter by parameter."""
    config = config_of(0, micro=BATCH)
    module = module_of(config).train()
    student = {name: p for name, p in module.named_parameters() if p.requires_grad and "clustering" not in name}
    optimizers = [
        torch.optim.AdamW(module.clustering.parameters(), lr=RATE / 2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.01)
    ]
    for name, parameter in student.items():
        decay = 0.01 if "norm" in name and name.endswith("weight") else DECAY * (
            parameter.ndim > 1 and not name.endswith(("pos_embed", "token"))
        )  # fmt: skip
        rate = RATE / 5 if "patch_embed" in name else RATE
        optimizers.append(torch.optim.AdamW([parameter], lr=rate, betas=(0.9, 0.95), eps=1e-6, weight_decay=decay))
    losses = []
    for step in range(STEPS):
        outcome = module(batch_of(step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        outcome.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        momentum = module.teacher_momentum(WARM)
        with torch.no_grad():
            for name, parameter in module.teacher.named_parameters():
                parameter.copy_(momentum * parameter + (1 - momentum) * module.encoder.get_parameter(name))
        losses.append(outcome.loss.item())
    teacher = {name: p.clone() for name, p in module.teacher.named_parameters()}
    return losses, {name: p.detach().clone() for name, p in module.named_parameters()}, teacher


def train_on_engine(settings: list, steps: int, folder: str, resume_from: str | None = None) -> dict:
    """(losses, teacher, (graphs, breaks), teacher rolled back) of each (stage, micro-batch, backend, precision)."""
    deepspeed.REDUCE_BUCKET_ELEMENTS = 30_000
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = {}
    for stage, micro, backend, precision in settings:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = config_of(stage, micro=micro)
        module = module_of(config)
        plan = plan_batches(BATCH, micro, world_size)
        engine = Engine(module, config, plan, precision=precision, compile_backend=backend)
        first = 0
        if resume_from is not None:
            checkpoint = RunDirectory(resume_from).newest_checkpoint()
            load_checkpoint(engine.state, checkpoint)
            first = checkpoint.step
        losses = [
            engine.step([_in_precision(engine, batch)], RATE, stop=False, progress=WARM).loss
            for batch in (batch_of(step, rank, world_size) for step in range(first, steps))
        ]
        save_state(engine, f"{folder}/{stage}-{precision}", steps)
        teacher = _teacher(module)
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        engine.state.begin_from(dict(module_of(config, seed=1).named_parameters()))
        results[stage, precision] = losses, teacher, (graphs, breaks), _teacher(module)
    return results


def _in_precision(engine: Engine, batch: Batch) -> Batch:
    return batch._replace(images=batch.images.to(engine.compute_dtype))


def _teacher(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies that outlive the rank."""
    return {name: parameter.float().numpy().copy() for name, parameter in module.teacher.named_parameters()}


def worst(ours: dict, theirs: dict) -> float:
    return max(np.abs(np.asarray(ours[name]) - np.asarray(theirs[name].detach())).max() for name in theirs)


@pytest.fixture(scope="module")
def literal():
    return train_literally()


def test_the_teacher_is_a_literal_average_at_every_stage_and_one_optimizer_is_both(literal, tmp_path):
    losses, weights, teacher = literal
    settings = [(0, 4, "aot_eager", "fp32"), (1, 4, None, "fp32"), (2, 4, "aot_eager", "fp32")]
    own, other = run_on_ranks(train_on_engine, 2, settings, STEPS, str(tmp_path))
    for (stage, _), (ours, followed, (graphs, breaks), again) in own.items():
        name = f"{tmp_path}/{stage}-fp32"
        average = saved_weights(name, average=True)
        assert ours == pytest.approx(losses, abs=1e-5)
        assert worst(saved_weights(name), weights) < 1e-5
        assert worst(followed, teacher) < 1e-5
        assert all(np.array_equal(followed[one], average[f"encoder.{one}"]) for one in followed)
        assert all(np.array_equal(followed[one], other[stage, "fp32"][1][one]) for one in followed)
        assert (graphs, breaks) == ((0, 0) if stage == 1 else (1, 0))
        assert worst(again, dict(module_of(config_of(0, micro=4), seed=1).teacher.named_parameters())) == 0.0


def test_a_resume_at_another_world_size_and_stage_begins_with_the_same_teacher(literal, tmp_path):
    _, weights, teacher = literal
    settings = [(2, 4, None, "fp32"), (1, 4, None, "bf16")]
    halves, _ = run_on_ranks(train_on_engine, 2, settings, STOP, str(tmp_path / "half"))
    half = str(tmp_path / "half" / "2-fp32")
    [results] = run_on_ranks(train_on_engine, 1, [(0, 8, None, "fp32")], STEPS, str(tmp_path / "whole"), half)
    assert worst(saved_weights(str(tmp_path / "whole" / "0-fp32")), weights) < 1e-5
    assert worst(results[0, "fp32"][1], teacher) < 1e-5
    average = saved_weights(
        str(tmp_path / "half" / "1-bf16"), average=True
    )  # in fp32, whatever the teacher computes in
    assert worst(halves[1, "bf16"][1], {n: average[f"encoder.{n}"].bfloat16().float() for n in teacher}) == 0.0
