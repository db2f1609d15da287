"""Recipes, overrides and plans: every problem in one line with what would be right."""

import pytest

from pipeline.config.plan import plan_batches, plan_steps
from pipeline.config.recipe import apply_overrides, load_recipe, parse_overrides, split_profile_overrides
from pipeline.config.training import PretrainConfig
from pipeline.errors import InputError

RECIPE = "pretrain_mae_vit_s16"


def problems(*overrides: str, recipe: str = RECIPE) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(PretrainConfig, recipe, overrides)
    return "\n".join(error.value.problems)


def test_a_misspelt_key_gets_the_key_that_was_meant():
    assert "optimizer.lerning_rate: no such key; did you mean `learning_rate`" in problems("optimizer.lerning_rate=1")
    assert "optimizer.betas: no such key" in problems("optimizer.kind=sgd", "optimizer.betas=[0.9,0.9]")
    assert "objective.mask_rati: no such key; did you mean `mask_ratio`?" in problems("objective.mask_rati=0.5")
    assert "did you mean `depth`" in problems("objective.decoder.dept=2")


def test_an_unknown_recipe_gets_near_matches():
    assert "pretrain_mae_vit_l16" in problems(recipe="pretrain_mae_vit_l17")


def test_all_problems_come_at_once_with_key_and_value():
    found = problems("objective.mask_ratio=1.5", "optimizer.learning_rate=-1", "micro_batch_size=true")
    assert len(found.splitlines()) == 3
    assert "(got 1.5)" in found and "(got -1)" in found and "(got True)" in found


@pytest.mark.parametrize("value", ["1e-3", "0.001", "1.0e-3"])
def test_numbers_may_be_written_as_people_write_them(value):
    assert load_recipe(PretrainConfig, RECIPE, [f"optimizer.learning_rate={value}"]).optimizer.learning_rate == 0.001


def test_an_override_without_a_value_is_refused():
    assert "expected key=value" in problems("epochs")


def test_the_length_is_said_exactly_once():
    assert "exactly one of epochs, steps, samples" in problems("steps=10")


def test_mixing_needs_pairs_and_lanes_divide_the_batch():
    assert "must be even" in problems("augmentation.mixup_alpha=0.8", "micro_batch_size=3")
    assert "does not divide" in problems("data.lanes=7")


def test_overrides_do_not_change_what_they_are_applied_to():
    raw = {"a": {"b": 1}}
    assert apply_overrides(raw, parse_overrides(["a.b=2", "c.d=[1, 2]"])) == {"a": {"b": 2}, "c": {"d": [1, 2]}}
    assert raw == {"a": {"b": 1}}
    assert split_profile_overrides(["profile.nodes=2", "steps=3"]) == (["steps=3"], ["nodes=2"])


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(InputError, match="nearest that are: 4 and 8"):
        plan_batches(7, 2, 2)
    assert plan_batches(4096, 64, 8).gradient_accumulation_steps == 8


@pytest.mark.parametrize(("length", "steps"), [("epochs=2", 20), ("epochs=0.25", 3), ("steps=7", 7), ("samples=1", 1)])
def test_a_length_in_any_unit_becomes_whole_steps(length, steps):
    config = load_recipe(
        PretrainConfig, "pretrain_mae_debug", [length] if length.startswith("steps") else ["steps=null", length]
    )
    assert plan_steps(config, 160).steps == steps
