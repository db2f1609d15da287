"""The learning rate, and which parameters decay."""

import math

import pytest

from pipeline.config.optimizer import AdamWConfig, LarsConfig
from pipeline.config.plan import StepPlan, plan_steps
from pipeline.config.training import PretrainConfig
from pipeline.errors import InputError
from pipeline.training.optimizer import build_optimizer, parameter_groups
from pipeline.training.schedule import Schedule
from tests.recipes import load_recipe


def rate(seen: int, schedule: str = "cosine", warmup: int = 100, cooldown: int = 0, samples: int = 1000) -> float:
    config = AdamWConfig(learning_rate=1.0, end_learning_rate=0.1, schedule=schedule)
    return Schedule(config, StepPlan(samples, samples // 10, warmup, cooldown)).rate(seen)


def test_the_rate_rises_linearly_then_falls_to_its_end():
    assert rate(50) == pytest.approx(0.5) and rate(100) == 1.0
    assert rate(550) == pytest.approx(0.55) and rate(1000) == pytest.approx(0.1) and rate(2000) == pytest.approx(0.1)
    assert rate(550, "linear") == pytest.approx(0.55) and rate(775, "linear") == pytest.approx(0.325)
    assert rate(900, "constant") == 1.0 and rate(0, warmup=0) == 1.0


def test_a_truncated_cosine_stops_on_its_way():
    config = AdamWConfig(learning_rate=1.0, cosine_share=0.8)
    schedule = Schedule(config, StepPlan(1000, 100, 100))
    assert schedule.rate(550) == pytest.approx(0.5 * (1 + math.cos(0.4 * math.pi)))
    assert schedule.rate(1000) == pytest.approx(0.0955, abs=1e-4)


def test_a_constant_rate_cools_down_over_its_last_part_and_is_the_same_before_in_a_longer_run():
    assert rate(800, "constant", cooldown=200) == 1.0
    assert rate(850, "constant", cooldown=200) == pytest.approx(0.1 + 0.9 * 0.5)  # 1 - sqrt(1/4)
    assert rate(1000, "constant", cooldown=200) == pytest.approx(0.1) == rate(1200, "constant", cooldown=200)
    short, long = (
        [rate(seen, "constant", 100, 200, samples) for seen in range(0, 801, 10)] for samples in (1000, 5000)
    )
    assert short == long


def test_a_rate_that_falls_by_itself_has_no_cool_down_and_ramps_fit_into_the_run():
    with pytest.raises(ValueError, match="cooldown 2 needs schedule: constant; cosine falls by itself"):
        AdamWConfig(learning_rate=1.0, cooldown=2)
    settings = ["steps=10", "optimizer.schedule=constant", "optimizer.warmup=4"]
    config = load_recipe(PretrainConfig, "pretrain_mae_debug", [*settings, "optimizer.cooldown=6"])
    assert plan_steps(config, 100).cooldown_samples == 6 * config.global_batch_size
    config = load_recipe(PretrainConfig, "pretrain_mae_debug", [*settings, "optimizer.cooldown=7"])
    with pytest.raises(InputError, match="optimizer.cooldown 7 and warmup 4 are longer than the run's 10 steps"):
        plan_steps(config, 100)


def test_norms_biases_tokens_and_positions_do_not_decay():
    from models.build import build_objective
    from models.encoders.config import EncoderConfig
    from models.objectives.config import SupervisedConfig

    module = build_objective(SupervisedConfig(), EncoderConfig(name="vit_ti16", depth=2), num_classes=3, seed=0)
    groups = parameter_groups(module, AdamWConfig(learning_rate=1.0, layer_decay=0.5), depth=2)
    by_name = {name: p for name, p in module.named_parameters()}
    grouped = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_name)
    assert grouped[id(by_name["encoder.cls_token"])]["weight_decay"] == 0
    assert grouped[id(by_name["encoder.blocks.0.norm1.weight"])]["weight_decay"] == 0
    assert grouped[id(by_name["encoder.blocks.1.attn.qkv.weight"])]["weight_decay"] == 0.05
    names = ("pos_embed", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "head.weight")
    scales = [grouped[id(by_name[f"encoder.{name}"])]["learning_rate_scale"] for name in names]
    assert scales == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_steps_by_the_norms_of_matrices_with_and_without_weight_decay(decay):
    """Literally (arXiv:1708.03888, equation 6, as in MAE's linear probe): of biases it is momentum."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    config = LarsConfig(learning_rate=0.5, weight_decay=decay, momentum=0.9)
    optimizer = build_optimizer(parameter_groups(module, config, depth=1), config)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    moving = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(3):
        optimizer.zero_grad()
        module(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        for name, parameter in module.named_parameters():
            update = parameter.grad.clone()
            if parameter.ndim > 1:
                update += decay * expected[name]
                update *= 0.001 * expected[name].norm() / update.norm()
            moving[name] = 0.9 * moving[name] + update
            expected[name] -= 0.5 * moving[name]
        optimizer.step()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)
