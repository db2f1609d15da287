"""Bytes that ranks exchange per optimizer step, by the least that the ZeRO paper allows, counted on real gloo ranks.

Every collective of c10d is counted where torch dispatches it, so also those that DDP issues from C++. What it moves is
weighed as it lies on the wire of a ring, per rank and without the factor (n-1)/n that all share: an all-reduce 2 times
its tensor; a reduce, broadcast, all-gather or reduce-scatter 1 time its whole tensor. Psi is the number of trained
parameters; the least is 2 Psi for plain data parallel and ZeRO-1 and 2, and 3 Psi for ZeRO-3 (arXiv:1910.02054,
section 7), each in the compute precision. ZeRO-3 stands below where it keeps what it gathered from forward to backward.
Gradients that are sharded (ZeRO-2 and 3) leave after every micro-batch, so accumulation costs them one Psi each.
The network is as wide as ViT-L, with fewer blocks. About 4 minutes:

    uv run python -m tests.benchmarks.comm_volume
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.objectives.batch import Batch
from models.objectives.config import SupervisedConfig
from pipeline.config.plan import count_parameters, plan_batches
from pipeline.config.training import PretrainConfig
from tests.benchmarks.our_deepspeed import our_deepspeed_config
from tests.benchmarks.report import Goal, main, table, verdict
from tests.ranks import run_on_ranks

LEAST = {0: 2, 1: 2, 2: 2, 3: 3}  # Psi, by stage
ON_THE_WIRE = {"allreduce": 2, "reduce": 1, "broadcast": 1, "allgather": 1, "reduce_scatter": 1}
TOLERANCE = 0.01
WARM_STEPS, IMAGE_SIZE, CLASSES = 2, 32, 10
LARGE, SMALL = (1024, 16), (64, 4)  # width and heads


class Case(NamedTuple):
    """One training of the table."""

    system: str  # ours, DeepSpeed, accelerate + DeepSpeed, FSDP2
    stage: int
    ranks: int = 2
    accumulation: int = 1
    precision: str = "fp32"
    small: bool = False


class Traffic(NamedTuple):
    """What one rank sends and receives in one step."""

    bytes_by_collective: dict[str, int]
    calls_by_collective: dict[str, int]
    parameters: int

    def wire_bytes(self) -> int:
        return sum(ON_THE_WIRE[name] * count for name, count in self.bytes_by_collective.items())


OURS = [Case("ours", stage) for stage in (0, 1, 2, 3)]
SHOWN = [
    Case("ours", 1, ranks=4), Case("ours", 1, accumulation=4), Case("ours", 2, accumulation=4),
    Case("ours", 1, precision="bf16"), Case("ours", 1, ranks=4, small=True),
]  # fmt: skip
PEERS = [Case(system, stage) for system in ("DeepSpeed", "accelerate + DeepSpeed") for stage in (1, 2, 3)]
FSDP = Case("FSDP2", 3)


def comm_volume(depth: int = 2) -> tuple[str, dict[str, Any]]:
    counted = {case: run_on_ranks(count, case.ranks, case, depth)[0] for case in [*OURS, *SHOWN, *PEERS, FSDP]}
    ratios = {case: traffic.wire_bytes() / least_bytes(case, traffic) for case, traffic in counted.items()}
    exact = [case for case in counted if case.system == "ours" and case.stage in (1, 2) and is_held(case)]
    goals = {
        f"{words(case)}, off the paper's": Goal(abs(ratios[case] - 1), TOLERANCE, at_least=False) for case in exact
    }
    goals["gradient buckets of ViT-L"] = Goal(gradient_buckets("vit_l16"), 4)
    rows = [row(case, traffic, ratios[case]) for case, traffic in counted.items()]
    sizes = ", ".join(sorted({f"{traffic.parameters:,}" for traffic in counted.values()}))
    columns = ["training", "ranks", "MB per step", "Psi", "by the least", "collectives", "of which"]
    text = table(f"Traffic per rank and step; networks of {sizes} parameters", columns, rows)
    text += "\n".join(goal.line(name) for name, goal in goals.items())
    best = min((case for case in PEERS if case.stage == 1), key=ratios.__getitem__)
    result = verdict(
        "comm_volume", goals, ratio=round(ratios[Case("ours", 1)], 4), best_peer=best.system, goal=1.0,
        by_the_least={words(case): round(ratio, 4) for case, ratio in ratios.items()},
    )  # fmt: skip
    return text, result


def is_held(case: Case) -> bool:
    """Whether the goal is meant for it: large partitions, compute precision on the wire, one reduction a step."""
    return not case.small and case.precision == "fp32" and (case.accumulation == 1 or case.stage == 1)


def least_bytes(case: Case, traffic: Traffic) -> int:
    return LEAST[case.stage] * traffic.parameters * (2 if case.precision == "bf16" else 4)


def words(case: Case) -> str:
    parts = [case.system, f"ZeRO-{case.stage}" if case.stage else "without ZeRO"]
    parts = [case.system] if case.system == "FSDP2" else parts
    parts += [f"{case.ranks} ranks"] if case.ranks != 2 else []
    parts += [f"accumulation {case.accumulation}"] if case.accumulation > 1 else []
    parts += [case.precision] if case.precision != "fp32" else []
    return ", ".join(parts + (["small"] if case.small else []))


def row(case: Case, traffic: Traffic, ratio: float) -> list[str]:
    calls = traffic.calls_by_collective
    return [
        words(case), str(case.ranks), f"{traffic.wire_bytes() / 1e6:,.1f}", f"{ratio * LEAST[case.stage]:.3f}",
        f"{ratio:.4f}", str(sum(calls.values())), ", ".join(f"{calls[name]} {name}" for name in sorted(calls)),
    ]  # fmt: skip


def gradient_buckets(name: str) -> int:
    """Into how many buckets the gradients of an encoder with 1000 classes fall, under our DeepSpeed dictionary."""
    parameters = count_parameters(EncoderConfig(name=name), SupervisedConfig(), num_classes=1000)
    config = case_config(Case("ours", 1), depth=1)
    dictionary = our_deepspeed_config(config, world_size=2, parameters=parameters)
    return math.ceil(parameters / dictionary["zero_optimization"]["reduce_bucket_size"])


class CollectiveCounter(TorchDispatchMode):
    """Counts calls and bytes of c10d's collectives while it is entered."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.name().removeprefix("c10d::")
        if name != function.name() and "barrier" not in name:
            kind = next((kind for kind in ("reduce_scatter", *ON_THE_WIRE) if name.strip("_").startswith(kind)), None)
            assert kind, f"{function.name()} has no weight"
            # The whole tensor: the output of a gather, the input of a scatter.
            self.bytes[kind] += max(tensor_bytes(argument) for argument in arguments)
            self.calls[kind] += 1
        return function(*arguments, **(options or {}))


def tensor_bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(tensor_bytes, argument)) if isinstance(argument, list | tuple) else 0


def count(case: Case, depth: int) -> Traffic:
    """Train some steps of a case and count the last. Collective."""
    config = case_config(case, depth)
    module = build_objective(config.objective, config.encoder, num_classes=CLASSES, seed=0)
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    match case.system:
        case "ours":
            step = our_step(case, config, module)
        case "DeepSpeed":
            step = deepspeed_step(case, module)
        case "accelerate + DeepSpeed":
            step = accelerate_step(case, module)
        case "FSDP2":
            step = fsdp_step(case, module)
    for _ in range(WARM_STEPS):
        step()
    with CollectiveCounter() as counter:
        step()
    return Traffic(dict(counter.bytes), dict(counter.calls), parameters)


def case_config(case: Case, depth: int) -> PretrainConfig:
    width, heads = SMALL if case.small else LARGE
    return PretrainConfig.model_validate({
        "encoder": {"name": "vit_l16", "image_size": IMAGE_SIZE, "embed_dim": width, "num_heads": heads, "depth": depth,
                    "positions": "sincos2d"},
        "objective": {"kind": "supervised"},
        "optimizer": {"learning_rate": 1e-4, "max_grad_norm": 1.0},
        "zero": {"stage": case.stage}, "steps": 10,
        "micro_batch_size": 1, "global_batch_size": case.ranks * case.accumulation,
    })  # fmt: skip


def one_image(dtype: torch.dtype = torch.float32) -> Batch:
    rank = int(os.environ["RANK"])
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Batch(images.to(dtype), torch.tensor([rank % CLASSES]), torch.tensor([rank]))


def our_step(case: Case, config: PretrainConfig, module: torch.nn.Module) -> Callable[[], Any]:
    from pipeline.training.engine import Engine

    plan = plan_batches(config.global_batch_size, config.micro_batch_size, case.ranks)
    engine = Engine(module, config, plan, precision=case.precision)
    batch = one_image(engine.compute_dtype)
    return lambda: engine.step([batch] * case.accumulation, 1e-4, stop=False)


def deepspeed_step(case: Case, module: torch.nn.Module) -> Callable[[], Any]:
    """DeepSpeed as it is when nothing but the stage is said."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need a compiler
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(module.parameters(), 1e-4),
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": case.stage},
            "zero_allow_untested_optimizer": True,
        },
    )  # fmt: skip

    def step() -> None:
        engine.backward(engine(one_image()).loss)
        engine.step()

    return step


def accelerate_step(case: Case, module: torch.nn.Module) -> Callable[[], Any]:
    """accelerate with its DeepSpeed plugin's defaults."""
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import InitProcessGroupKwargs

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    plugin = DeepSpeedPlugin(zero_stage=case.stage)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    wrapped, _ = accelerator.prepare(module, torch.optim.AdamW(module.parameters(), 1e-4))
    return lambda: accelerator.backward(wrapped(one_image()).loss)


def fsdp_step(case: Case, module: torch.nn.Module) -> Callable[[], Any]:
    """FSDP2 as its documentation shows it: every block, then the root."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (case.ranks,))
    for block in module.encoder.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4)

    def step() -> None:
        module(one_image()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main(comm_volume, "comm_volume", ("torch", "deepspeed", "accelerate"))
