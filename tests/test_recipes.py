"""Every recipe loads, plans on a realistic world, and resolves to its golden file."""

import json
import os
from pathlib import Path

import pytest

from pipeline.config.plan import plan_batches, plan_steps, training_flops
from pipeline.config.recipe import read_yaml, recipe_names, recipe_path
from pipeline.config.training import FinetuneConfig, PretrainConfig
from pipeline.preparation.training import CONFIGS
from tests.recipes import load_recipe

GOLDEN = Path(__file__).parent / "golden" / "recipes"
IMAGENET_SAMPLES = 1_281_167
ENCODER_OF_A_MODEL = ["encoder.name=vit_b16", "initialise_from=models:/vit@champion"]


def resolved(name: str) -> PretrainConfig | FinetuneConfig:
    stage = read_yaml(recipe_path(name))["stage"]
    return load_recipe(CONFIGS[stage], name, ENCODER_OF_A_MODEL if stage == "finetune" else [])


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_resolves_to_its_golden_file(name):
    """A changed default shows up here as a changed experiment; accept it with VIT_ACCEPT_GOLDEN=1."""
    path = GOLDEN / f"{name}.json"
    text = json.dumps(resolved(name).model_dump(mode="json"), indent=1) + "\n"
    if os.environ.get("VIT_ACCEPT_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, world) for name in recipe_names() for world in (1, 2, 8) if world <= 2 or "vit_" in name],
)
def test_a_recipe_plans_on_worlds_of_several_sizes(name, world_size):
    config = resolved(name)
    batches = plan_batches(config.global_batch_size, config.micro_batch_size, world_size)
    assert batches.gradient_accumulation_steps * batches.micro_batch_size * world_size == config.global_batch_size
    steps = plan_steps(config, IMAGENET_SAMPLES)
    assert 0 <= steps.warmup_samples < steps.samples
    assert training_flops(config.encoder, config.objective, 1000) > 0


@pytest.mark.parametrize("objective", ["mae", "supervised"])
@pytest.mark.parametrize("encoder", ["vit_s16", "vit_b16", "vit_l16", "vit_h14"])
def test_masked_and_supervised_recipes_exist_for_every_encoder(objective, encoder):
    config = resolved(f"pretrain_{objective}_{encoder}")
    assert (config.encoder.name, config.objective.kind, config.zero.stage) == (encoder, objective, 1)


def test_every_recipe_says_in_its_header_what_it_is_and_how_it_is_run():
    for name in recipe_names():
        header = [line for line in recipe_path(name).read_text().splitlines() if line.startswith("#")]
        assert any("Run: vit " in line for line in header), name
