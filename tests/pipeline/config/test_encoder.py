"""Which encoder a recipe names, by whichever kind of name, and what is said where a key is another kind's."""

from pathlib import Path

import pytest

from pipeline.config.recipe import apply_overrides, validate
from pipeline.config.training import PretrainConfig
from pipeline.errors import InputError
from pipeline.preparation.origin import start_from, without_keys_of_a_plain_vit
from pipeline.registry.locate import ModelSource
from tests.recipes import load_recipe


def config_of(*overrides: str, recipe: str = "pretrain_supervised_debug") -> PretrainConfig:
    return load_recipe(PretrainConfig, recipe, list(overrides))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["encoder.deptth=3"], "--set encoder.deptth: no such key; did you mean `depth`?"),
        (["encoder.layer_scale=-1"], "--set encoder.layer_scale: expected a number above 0"),
        (["encoder.class_token=false"], "class_token is false; set pooling to mean"),
    ],
)
def test_a_wrong_encoder_is_one_line(settings, line):
    with pytest.raises(InputError) as raised:
        config_of(*settings)
    assert len(raised.value.problems) == 1 and line in raised.value.problems[0]


@pytest.mark.parametrize(
    ("recipe", "encoder", "line"),
    [
        (
            "mae",
            {"name": "timm:swin_tiny_patch4_window7_224"},
            "mae trains plain ViTs alone, and encoder.name timm:",
        ),
        (
            "simmim",
            {"name": "timm:convnext_tiny"},
            "another network; that learns with labels, objective.kind supervised, or, a Swin but swinv2_cr, by simmim",
        ),
        ("simmim", {"name": "timm:swinv2_cr_tiny_224"}, "objective.kind simmim trains plain ViTs alone"),
        (
            "simmim",
            {"name": "timm:swin_tiny_patch4_window7_224"},
            "objective.mask_size 8 must be a multiple of the 32 pixels that are a side of a token of timm:swin_tiny",
        ),
        ("mae", {"name": "vit_s16", "representation": True}, "encoder.representation is a layer before the head"),
        ("mae", {"name": "vit_s16", "positions": "relative"}, "take relative_shared"),
        ("supervised", {"name": "timm:cvt_13"}, "timm has no CvT; the nearest"),
        ("supervised", {"name": "timm:convnext_tiny", "depth": 2}, "encoder.depth: no such key"),
    ],
)
def test_an_objective_and_an_encoder_that_do_not_go_together_are_refused_in_one_line(recipe, encoder, line):
    raw = load_recipe(PretrainConfig, f"pretrain_{recipe}_debug", []).model_dump()
    with pytest.raises(InputError) as raised:
        validate(PretrainConfig, raw | {"encoder": encoder}, "recipe.yaml")
    assert len(raised.value.problems) == 1 and line in raised.value.problems[0]


def test_weights_of_another_network_than_the_recipes_plain_vit_are_refused_by_its_name():
    swin = ModelSource("swin", "checkpoint", "swin", encoder={"name": "timm:swin_tiny_patch4_window7_224"})
    with pytest.raises(InputError, match="encoder.name vit_s16: the weights of `swin` are of timm:swin_tiny"):
        start_from({"stage": "pretrain", "encoder": {"name": "vit_s16"}}, swin, {}, Path("x.yaml"), [])


def test_a_recipe_for_a_plain_vit_leaves_its_keys_out_for_another_network():
    notes: list[str] = []
    raw = {"encoder": {"name": "vit_s16", "image_size": 64, "pooling": "mean", "drop_path_rate": 0.1}}
    settings = {"encoder.name": "timm:convnext_tiny"}
    found = without_keys_of_a_plain_vit(raw, settings, notes)["encoder"]
    assert found == {"name": "vit_s16", "drop_path_rate": 0.1}
    assert notes == [
        "encoder.name=timm:convnext_tiny: left out what the recipe says for a plain ViT: encoder.pooling, "
        "encoder.image_size"
    ]
    encoder = validate(PretrainConfig, apply_overrides(config_of().model_dump() | {"encoder": found}, settings), "x")
    assert (encoder.encoder.name, encoder.encoder.input_size) == ("timm:convnext_tiny", (224, 224))
