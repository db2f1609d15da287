"""What `compile_clean` runs on a rank: a few compiled steps, and what torch.compile counted meanwhile."""

import os
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.masked.decoder_config import DecoderConfig
from models.objectives.batch import Batch
from models.objectives.config import MaskedAutoencoderConfig, SupervisedConfig
from pipeline.config.plan import plan_batches
from pipeline.config.training import PretrainConfig
from pipeline.training.engine import Engine

BACKEND = "eager"  # graphs are found as for any other; none of the time goes into kernels
CLASSES, BATCH_SIZE, IMAGE_SIZE, RATE = 5, 4, 16, 1e-3
STEPS_TO_WARM_UP = 2
CASES = ("supervised", "MAE", "drop path")


class Counted(NamedTuple):
    """Of one training on one rank."""

    graphs: int
    breaks: int
    recompiles: int  # graphs made after the first two steps
    losses: list[float]


def parts(case: str, stage: int) -> int:
    """Graphs that a module needs: one, or under ZeRO-3 one for each kind of block.

    Encoder and decoder differ in width; a block without drop path is another than one with it.
    """
    return 1 if stage < 3 or case == "supervised" else 2


def train(contestant: str, case: str, stage: int, compiled: bool, steps: int) -> Counted:
    """`steps` steps of the contestant on this rank, compiled or not. Collective."""
    step = {"ours": _ours, "DeepSpeed": _deepspeed, "accelerate": _accelerate}[contestant](case, stage, compiled)
    losses, warm = [], 0
    for number in range(steps):
        losses.append(float(step(_batch(number))))
        if number + 1 == STEPS_TO_WARM_UP:
            warm = counters["stats"]["unique_graphs"]
    graphs = counters["stats"]["unique_graphs"]
    return Counted(graphs, sum(counters["graph_break"].values()), graphs - warm, losses)


def _config(case: str, stage: int) -> PretrainConfig:
    encoder = EncoderConfig(
        name="vit_ti16", image_size=IMAGE_SIZE, patch_size=4, embed_dim=48, depth=3, num_heads=3,
        drop_path_rate=0.2 if case == "drop path" else 0.0,
    )  # fmt: skip
    decoder = DecoderConfig(embed_dim=32, depth=2, num_heads=2)
    world_size = int(os.environ["WORLD_SIZE"])
    return PretrainConfig.model_validate({
        "encoder": encoder, "objective": MaskedAutoencoderConfig(decoder=decoder) if case == "MAE"
        else SupervisedConfig(), "optimizer": {"learning_rate": RATE}, "zero": {"stage": stage},
        "global_batch_size": BATCH_SIZE * world_size, "micro_batch_size": BATCH_SIZE, "steps": 1,
    })  # fmt: skip


def _module(case: str, stage: int) -> nn.Module:
    config = _config(case, stage)
    return build_objective(config.objective, config.encoder, num_classes=CLASSES, seed=0)


def _batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * number + int(os.environ["RANK"]))
    images = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
    return Batch(images, labels, torch.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE))


def _ours(case: str, stage: int, compiled: bool):
    config = _config(case, stage)
    plan = plan_batches(config.global_batch_size, config.micro_batch_size, int(os.environ["WORLD_SIZE"]))
    backend = BACKEND if compiled else None
    engine = Engine(_module(case, stage), config, plan, precision="fp32", compile_backend=backend)
    return lambda batch: engine.step([batch], RATE, stop=False).loss


def _deepspeed(case: str, stage: int, compiled: bool):
    """As its documentation has it: `initialize`, then `engine.compile`."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    module = _module(case, stage)
    engine, *_ = deepspeed.initialize(model=module, optimizer=_adamw(module), config=_dictionary(stage))
    if compiled:
        engine.compile(backend=BACKEND)

    def step(batch: Batch) -> Tensor:
        loss = engine(batch).loss
        engine.backward(loss)
        engine.step()
        return loss

    return step


def _accelerate(case: str, stage: int, compiled: bool):
    """As its documentation has it: `dynamo_backend`, then `prepare`; stage 0 is plain data parallel."""
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = BACKEND if compiled else "no"
    if stage == 0:
        accelerator = Accelerator(cpu=True, dynamo_backend=backend)
    else:
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_dictionary(stage)), dynamo_backend=backend,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        )  # fmt: skip
    module = _module(case, stage)
    module, optimizer = accelerator.prepare(module, _adamw(module))

    def step(batch: Batch) -> Tensor:
        loss = module(batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter for parameter in module.parameters() if parameter.requires_grad], lr=RATE)


def _dictionary(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": BATCH_SIZE,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
