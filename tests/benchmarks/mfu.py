"""Model FLOP/s of our training step on one GPU, by those of a matrix product that the same process times beside it.

bf16, compiled, random images that are on the device already; FLOPs by the formula of `pipeline/config/plan.py`, per
image and nominal. The limit is an 8192^3 product of random bf16 matrices, before and after the steps (zeros would be
faster). `fed` steps take their images from our loader instead, over photographs of ImageNet's size. The peer is plain
PyTorch as timm's train.py runs a model, with autocast, compile and fused AdamW; the script itself is not in timm's
package. Every case has a process of its own, as a fragmented or throttled one would speak for the next.
Needs a CUDA GPU of about 80 GB, and 15 minutes:

    uv run python -m tests.benchmarks.mfu
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from models.build import build_objective
from models.objectives.batch import Batch
from pipeline.config.plan import plan_batches, training_flops
from pipeline.config.training import PretrainConfig
from pipeline.loading.loader import Loader, to_device
from pipeline.loading.stream import SampleStream
from pipeline.ports import free_port
from pipeline.shards.index import DatasetIndex
from tests.benchmarks.our_loader import our_config, our_dataset
from tests.benchmarks.photographs import photograph_files
from tests.benchmarks.report import Goal, main, table, verdict

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES, WARM_STEPS, PRODUCTS = 1000, 5, 20


class Case(NamedTuple):
    """One training of the table."""

    encoder: str
    objective: str
    batch_size: int
    system: str = "ours"  # or "plain PyTorch"
    stage: int = 0
    fed: bool = False


SUPERVISED = [
    Case("vit_b16", "supervised", 512),
    Case("vit_l16", "supervised", 256),
    Case("vit_h14", "supervised", 128),
]
MASKED = [Case("vit_b16", "mae", 1024), Case("vit_l16", "mae", 1024)]
FED = (SUPERVISED[1], MASKED[0])  # at MAE-B's speed a slow loader shows first
GOALS = {SUPERVISED[1]: 0.60, SUPERVISED[2]: 0.62, MASKED[1]: 0.50}
FED_GOAL = 0.98


class Speed(NamedTuple):
    """What one case reached."""

    images_per_second: float
    flops_per_image: float
    product_flops_per_second: float

    @property
    def utilisation(self) -> float:
        return self.images_per_second * self.flops_per_image / self.product_flops_per_second


def mfu(steps: int = 10, side: int = 8192, files: int = 3000, distinct: int = 300) -> tuple[str, dict[str, Any]]:
    if not torch.cuda.is_available():
        reason = "no CUDA GPU: model FLOP/s of a processor say nothing of one"
        nothing = {"ratio": None, "best_peer": None, "goal": GOALS[SUPERVISED[1]]}
        return f"not measured: {reason}", verdict("mfu", {}, **nothing, skipped=reason) | {"ok": False}
    index = our_dataset(photograph_files(distinct, files))
    plain = [*SUPERVISED, *MASKED]
    cases = [variant for case in plain for variant in variants(case)] + [case._replace(fed=True) for case in FED]
    speeds = {case: in_own_process(case, steps, side, index) for case in cases}
    goals = {f"{words(case)}, by the product": Goal(speeds[case].utilisation, goal) for case, goal in GOALS.items()}
    for case in FED:
        share = speeds[case._replace(fed=True)].images_per_second / speeds[case].images_per_second
        goals[f"{words(case)}, loader-fed by synthetic"] = Goal(share, FED_GOAL)
    rows = [
        [words(case), f"{speed.images_per_second:,.0f}", f"{speed.product_flops_per_second / 1e12:,.0f}",
         f"{speed.utilisation:.3f}"] for case, speed in speeds.items()
    ]  # fmt: skip
    title = f"{torch.cuda.get_device_name()}: images/s, and model FLOP/s by those of a {side}^3 product"
    text = table(title, ["training", "images/s", "product TFLOP/s", "utilisation"], rows)
    text += "\n".join(goal.line(name) for name, goal in goals.items())
    ours, peer = (speeds[case].images_per_second for case in variants(SUPERVISED[1])[::2])
    result = verdict(
        "mfu", goals, ratio=round(ours / peer, 3), best_peer="plain PyTorch", goal=GOALS[SUPERVISED[1]],
        utilisation={words(case): round(speed.utilisation, 4) for case, speed in speeds.items()},
    )  # fmt: skip
    return text, result


def variants(case: Case) -> list[Case]:
    return [case, case._replace(stage=1), case._replace(system="plain PyTorch")]


def words(case: Case) -> str:
    stage = f", ZeRO-{case.stage}" if case.stage else ""
    return f"{case.encoder} {case.objective} of {case.batch_size}, {case.system}{stage}{', fed' if case.fed else ''}"


def in_own_process(*arguments: Any) -> Speed:
    """`measure(*arguments)` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def measure(case: Case, steps: int, side: int, index: DatasetIndex, **encoder: Any) -> Speed:
    """Train `steps` steps of a case; `encoder` changes its size."""
    port = str(free_port())
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    config = case_config(case, index, encoder)
    plan = plan_batches(case.batch_size, case.batch_size, 1)
    workers = len(os.sched_getaffinity(0)) - 1 if case.fed else 0
    stream = SampleStream(config, [index])
    last_step = WARM_STEPS + steps
    with Loader(stream, plan, rank=0, first_step=0, last_step=last_step, workers=workers) as loader:  # forks first
        cuda = torch.cuda.is_available()
        device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
        module = build_objective(config.objective, config.encoder, num_classes=CLASSES, seed=0).to(device)
        if cuda:
            module.compile()
        train = our_step(config, module, cuda) if case.system == "ours" else plain_step(config, module, cuda)
        batches = fed_batches(loader, device, dtype) if case.fed else same_batch(config, device, dtype)
        for _ in range(WARM_STEPS):
            train(next(batches))
        before = product_flops_per_second(side, device, dtype)
        seconds = timed(lambda: [train(next(batches)) for _ in range(steps)])
        after = product_flops_per_second(side, device, dtype)
    flops = training_flops(config.encoder, config.objective, CLASSES)
    return Speed(steps * case.batch_size / seconds, flops, (before + after) / 2)


def case_config(case: Case, index: DatasetIndex, encoder: dict[str, Any]) -> PretrainConfig:
    data = our_config(index, case.batch_size, 224).data.model_copy(update={"mean": MEAN, "std": STD})
    return PretrainConfig.model_validate({
        "encoder": {"name": case.encoder} | encoder, "objective": {"kind": case.objective}, "data": data.model_dump(),
        "optimizer": {"learning_rate": 1e-4, "max_grad_norm": 1.0}, "zero": {"stage": case.stage}, "steps": 1000,
        "global_batch_size": case.batch_size, "micro_batch_size": case.batch_size,
    })  # fmt: skip


def our_step(config: PretrainConfig, module: torch.nn.Module, cuda: bool) -> Callable[[Batch], Any]:
    from pipeline.training.engine import Engine

    plan = plan_batches(config.global_batch_size, config.micro_batch_size, 1)
    engine = Engine(module, config, plan, precision="bf16" if cuda else "fp32")
    return lambda batch: engine.step([batch], 1e-4, stop=False)


def plain_step(config: PretrainConfig, module: torch.nn.Module, cuda: bool) -> Callable[[Batch], None]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)

    def step(batch: Batch) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            loss = module(batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def same_batch(config: PretrainConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Batch]:
    size = config.micro_batch_size
    images = torch.randn(size, 3, *config.encoder.input_size, device=device, dtype=dtype)
    labels, positions = torch.randint(CLASSES, (size,), device=device), torch.arange(size, device=device)
    while True:
        yield Batch(images, labels, positions)


def fed_batches(loader: Loader, device: torch.device, dtype: torch.dtype) -> Iterator[Batch]:
    return (to_device(raw, device, MEAN, STD, dtype) for raw in loader)


def product_flops_per_second(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two random matrices of `side` rows and columns."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right  # what is chosen and allocated once
    return PRODUCTS * 2 * side**3 / timed(lambda: [left @ right for _ in range(PRODUCTS)])


def timed(work: Callable[[], Any]) -> float:
    """Seconds of wall time, all kernels finished."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    began = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(mfu, "mfu", ("torch", "deepspeed", "timm"))
