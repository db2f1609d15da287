"""Every recipe loads, plans on a realistic world, and resolves to its golden file."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from models.encoders.config import EncoderConfig
from pipeline.config.plan import plan_batches, plan_steps, training_flops
from pipeline.config.recipe import read_yaml, recipe_names, recipe_path
from pipeline.config.training import FinetuneConfig, PretrainConfig
from pipeline.preparation.training import CONFIGS
from tests.recipes import load_recipe

GOLDEN = Path(__file__).parent / "golden" / "recipes"
IMAGENET_SAMPLES = 1_281_167
OF_A_MODEL = "initialise_from=models:/vit@champion"


def resolved(name: str) -> PretrainConfig | FinetuneConfig:
    stage = read_yaml(recipe_path(name))["stage"]
    size = re.search(r"vit_[a-z]+\d+$", name)  # a fine-tune takes the encoder of its model
    of_model = [f"encoder.name={size[0] if size else 'vit_b16'}", OF_A_MODEL]
    return load_recipe(CONFIGS[stage], name, of_model if stage == "finetune" else [])


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


@pytest.mark.parametrize("optimizer", ["sgd", "mae"])
@pytest.mark.parametrize("encoder", ["vit_s16", "vit_b16", "vit_l16", "vit_h14"])
def test_fine_tunes_of_both_papers_exist_for_every_encoder(optimizer, encoder):
    config = resolved(f"finetune_{optimizer}_{encoder}")
    assert config.optimizer.kind == {"sgd": "sgd", "mae": "adamw"}[optimizer]
    assert config.encoder.image_size == ({"vit_h14": 518}.get(encoder, 384) if optimizer == "sgd" else 224)


@pytest.mark.parametrize("name", [name for name in recipe_names() if re.search(r"^finetune_.*_v\d+$|_small$", name)])
@pytest.mark.parametrize(
    "encoder", ["{name: vit_s8, image_size: 64, pooling: mean, class_token: false}", "{name: vit_ti16}"]
)
def test_a_protocols_recipe_takes_any_image_size_and_pooling(name, encoder):
    keys = yaml.safe_load(encoder)
    settings = [f"encoder.{key}={json.dumps(value)}" for key, value in keys.items()]
    config, model = load_recipe(FinetuneConfig, name, [*settings, OF_A_MODEL]), EncoderConfig(**keys)
    assert config.encoder == model.model_copy(update={"drop_path_rate": config.encoder.drop_path_rate})
