"""The memory that is planned, against the tensors of real steps on two ranks."""

import pytest
import torch

from models.build import build_objective
from models.objectives.batch import Batch, Progress
from models.tuning.place import tune
from pipeline.config.memory import rank_memory
from pipeline.config.plan import plan_batches
from pipeline.config.training import FinetuneConfig, PretrainConfig
from pipeline.training.engine import Engine
from tests.pipeline.allocated import AllocatedBytes, living_storages
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow
RANKS, PIXELS = 2, 64
SETTINGS = {  # micro-batch, accumulated, and what else differs
    **{f"stage {stage}, {precision}": (8, 1, {"zero": {"stage": stage}, "precision": precision})
       for stage in range(4) for precision in ("fp32", "bf16")},
    **{f"stage {stage}, large batch": (48, 1, {"zero": {"stage": stage}}) for stage in (0, 1, 3)},
    **{f"stage {stage}, accumulated": (8, 2, {"zero": {"stage": stage}}) for stage in (0, 1, 2)},
    "masked": (32, 1, {"zero": {"stage": 1}, "objective": {"kind": "mae"}, "precision": "bf16"}),
    "colours": (32, 1, {"zero": {"stage": 1}, "objective": {"kind": "patch_colour", "target": "colours_4x4"}}),
    "hidden squares": (32, 1, {"zero": {"stage": 1}, "objective": {"kind": "simmim"}, "precision": "bf16"}),
    "latents, with a teacher": (32, 1, {
        "zero": {"stage": 1}, "objective": {"kind": "capi", "num_prototypes": 4096, "predictor_depth": 2},
        "precision": "bf16", "ema_decay": 0.0,
    }),
    "blocks computed again": (48, 1, {"zero": {"stage": 1}, "activation_checkpointing": True}),
    **{f"stage {stage}, {kind}": (32, 1, {"zero": {"stage": stage}, "tuning": {"kind": kind}})
       for stage in (0, 1, 3) for kind in ("head", "lora", "adapter", "visual_prompt")},
    "stage 0, adalora": (32, 1, {"zero": {"stage": 0}, "tuning": {"kind": "adalora"}}),
    "stage 2, lora in bf16": (32, 1, {"zero": {"stage": 2}, "tuning": {"kind": "lora"}, "precision": "bf16"}),
    "momentum alone, no average": (8, 1, {
        "zero": {"stage": 1}, "optimizer": {"kind": "sgd", "learning_rate": 1e-4}, "ema_decay": 0.0,
    }),
}  # fmt: skip


def planned_and_counted(settings: dict) -> dict[str, tuple[int, int]]:
    return {name: one_setting(*setting) for name, setting in settings.items()}


def one_setting(micro: int, accumulated: int, changes: dict) -> tuple[int, int]:
    more = {"initialise_from": "x"} if "tuning" in changes else {}
    config = (FinetuneConfig if more else PretrainConfig).model_validate({
        "encoder": {"name": "vit_s16", "image_size": PIXELS, "depth": 2}, "objective": {"kind": "supervised"},
        "optimizer": {"learning_rate": 1e-4}, "ema_decay": 0.99, "precision": "fp32", "steps": 4,
        "global_batch_size": micro * RANKS * accumulated, "micro_batch_size": micro,
    } | changes | more)  # fmt: skip
    others = living_storages()  # of engines that came before
    module = build_objective(config.objective, config.encoder, num_classes=10, seed=0)
    tune(module, config.tuning, seed=0)
    parameters = sum(one.numel() for one in module.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in module.parameters()) - parameters
    plan = plan_batches(config.global_batch_size, micro, RANKS)
    stage, precision = config.zero.stage, config.precision
    engine = Engine(module, config, plan, precision=precision)
    images = torch.randn(micro, 3, PIXELS, PIXELS, dtype=engine.compute_dtype if stage else torch.float32)
    batch = Batch(images, torch.zeros(micro, dtype=torch.long), torch.arange(micro))
    engine.step([batch] * accumulated, 1e-4, stop=False, progress=Progress(0.5, 0.1))  # the moments come with the first
    with AllocatedBytes(others) as counted:
        engine.step([batch] * accumulated, 1e-4, stop=False, progress=Progress(0.5, 0.1))
    planned = rank_memory(config, plan, parameters, stage=stage, precision=precision, frozen=frozen)
    return sum(planned), counted.peak


def test_planned_memory_is_within_15_percent_of_what_steps_allocate():
    for name, (planned, counted) in run_on_ranks(planned_and_counted, RANKS, SETTINGS)[0].items():
        print(f"{name:30} planned {planned / 2**20:7.1f} MiB, counted {counted / 2**20:7.1f}: {planned / counted:.3f}")
        assert planned == pytest.approx(counted, rel=0.15), name
