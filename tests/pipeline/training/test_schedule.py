"""The learning rate, and which parameters decay."""

import pytest

from pipeline.config.optimizer import OptimizerConfig
from pipeline.training.optimizer import parameter_groups
from pipeline.training.schedule import learning_rate


def rate(seen: int, schedule: str = "cosine", warmup: int = 100) -> float:
    return learning_rate(
        OptimizerConfig(learning_rate=1.0, end_learning_rate=0.1, schedule=schedule), seen, warmup, 1000
    )


def test_the_rate_rises_linearly_then_falls_to_its_end():
    assert rate(50) == pytest.approx(0.5) and rate(100) == 1.0
    assert rate(550) == pytest.approx(0.55) and rate(1000) == pytest.approx(0.1) and rate(2000) == pytest.approx(0.1)
    assert rate(550, "linear") == pytest.approx(0.55) and rate(775, "linear") == pytest.approx(0.325)
    assert rate(900, "constant") == 1.0 and rate(0, warmup=0) == 1.0


def test_norms_biases_tokens_and_positions_do_not_decay():
    from models.build import build_objective
    from models.config import EncoderConfig, SupervisedConfig

    module = build_objective(SupervisedConfig(), EncoderConfig(name="vit_ti16", depth=2), num_classes=3, seed=0)
    groups = parameter_groups(module, OptimizerConfig(learning_rate=1.0, layer_decay=0.5), depth=2)
    by_name = {name: p for name, p in module.named_parameters()}
    grouped = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_name)
    assert grouped[id(by_name["encoder.cls_token"])]["weight_decay"] == 0
    assert grouped[id(by_name["encoder.blocks.0.norm1.weight"])]["weight_decay"] == 0
    assert grouped[id(by_name["encoder.blocks.1.attn.qkv.weight"])]["weight_decay"] == 0.05
    names = ("pos_embed", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "head.weight")
    scales = [grouped[id(by_name[f"encoder.{name}"])]["learning_rate_scale"] for name in names]
    assert scales == [0.125, 0.25, 0.5, 1.0]
