"""Recipes, overrides and plans: every problem in one line with what would be right."""

import re

import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.config.plan import plan_batches, plan_steps
from pipeline.config.recipe import (
    apply_overrides,
    parse_overrides,
    read_yaml,
    recipe_path,
    resolve,
    split_profile_overrides,
    validate,
)
from pipeline.config.training import PretrainConfig
from pipeline.errors import InputError
from tests.recipes import load_recipe

RECIPE = "pretrain_mae_vit_s16"


def problems(*overrides: str, recipe: str = RECIPE) -> str:
    with pytest.raises(InputError) as error:
        load_recipe(PretrainConfig, recipe, overrides)
    return "\n".join(error.value.problems)


def test_a_misspelt_key_gets_the_key_that_was_meant():
    assert "optimizer.lerning_rate: no such key; did you mean `learning_rate`" in problems("optimizer.lerning_rate=1")
    assert "optimizer.betas: no such key of kind sgd; there are: cooldown" in problems(
        "optimizer.kind=sgd", "optimizer.betas=[0.9,0.9]"
    )
    assert "objective.mask_rati: no such key; did you mean `mask_ratio`?" in problems("objective.mask_rati=0.5")
    assert "did you mean `depth`" in problems("objective.decoder.dept=2")


def test_an_unknown_recipe_gets_near_matches():
    assert "pretrain_mae_vit_l16" in problems(recipe="pretrain_mae_vit_l17")


def test_all_problems_come_at_once_with_key_and_value():
    found = problems("objective.mask_ratio=1.5", "optimizer.learning_rate=-1", "micro_batch_size=true")
    assert len(found.splitlines()) == 3
    assert "(got 1.5)" in found and "(got -1)" in found and "(got true)" in found


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.kind=adam", 'expected adamw, sgd, lamb or lars (got "adam"); did you mean `adamw`?'),
        (
            "optimizer.betas=[0.9, 1.0]",
            "expected a list of 2, each a number of at least 0 and below 1 (got [0.9, 1.0])",
        ),
        ("optimizer.learning_rate=.inf", "expected a number above 0 and at most 10^12 (got Infinity)"),
        ("optimizer.learning_rate=true", "expected a number above 0 and at most 10^12 (got true)"),
        ("optimizer.schedule=cosin", 'expected cosine, linear or constant (got "cosin"); did you mean `cosine`?'),
        ("writers=tensorboard", 'expected a list, each tensorboard or wandb (got "tensorboard"); write [tensorboard]'),
        ("profiling.steps=[5]", "expected a list of 2, each a whole number from 1 to 10^12, or null (got [5])"),
        ("data.std=[0, 0, 0]", "expected a list, each a number above 0 and at most 10^12, or null (got [0, 0, 0])"),
        ("zero=3", "expected keys and values (got 3)"),
        (
            "encoder.image_size=0",
            "expected a whole number from 1 to 1,000,000 or a list of 2, each a whole number from 1 to 1,000,000",
        ),
        (
            "checkpoint.mirror=ftp://there/runs",
            "expected a URL that begins with one of s3://, s3a://, gs://, gcs://, file:// (got 'ftp://there/runs')",
        ),
        ("encoder.name=vit_x16", "name `vit_x16` is no encoder's; there are: vit_ti16, vit_s16, vit_b16, vit_l16, "),
        ("data.std=[1, 1]", "data.std has 2 values, encoder.channels is 3; they must agree"),
        ("objective.decoder.embed_dim=100", "embed_dim 100 is not a multiple of num_heads 6, and of 4"),
    ],
)
def test_a_problem_is_one_line_with_the_key_what_is_right_and_the_value(override, line):
    found = problems(override)
    assert found.startswith(f"--set {override.partition('=')[0]}: {line}") and "\n" not in found


def test_a_line_names_who_said_it(tmp_path):
    recipe = tmp_path / "mine.yaml"
    text = recipe_path("pretrain_mae_debug").read_text()
    recipe.write_text(f"{text}\nseed: -1\ndata: {{lanes: 7}}\n")
    assert problems(recipe=str(recipe)) == "mine.yaml: seed: expected a whole number from 0 to 10^12 (got -1)"
    assert problems("seed=0", recipe=str(recipe)).startswith("mine.yaml: data.lanes 7 does not divide")
    assert problems("seed=0", "data.lanes=5", recipe=str(recipe)).startswith("--set data.lanes: data.lanes 5 does not")


def test_a_recipe_that_is_like_none_is_told_three_and_where_the_others_lie():
    with pytest.raises(InputError, match=r"nearest are `[^,]+`, `[^,]+`, `[^,]+`; all \d+ lie in /.*recipes$"):
        recipe_path("resnet")


def test_a_kind_that_is_chosen_by_hand_leaves_out_what_the_recipe_says_for_another():
    raw = read_yaml(recipe_path(RECIPE))
    config, notes = resolve(PretrainConfig, raw, {"optimizer.kind": "sgd", "objective.kind": "supervised"}, "here")
    assert config.optimizer.kind == "sgd" and config.optimizer.learning_rate == raw["optimizer"]["learning_rate"]
    assert notes[0] == "--set optimizer.kind=sgd: left out what the recipe says for another kind: optimizer.betas"
    assert config.objective.kind == "supervised" and "objective.mask_ratio" in notes[1]
    assert (
        resolve(PretrainConfig, raw, {"optimizer.kind": "lamb", "zero.stage": 0}, "here")[1] == []
    )  # it has betas too
    assert "did you mean `kind`" in problems("optimizer.knd=sgd")


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


def test_mixing_without_labels_is_refused():
    for key in ("mixup_alpha", "cutmix_alpha"):
        with pytest.raises(
            InputError, match=f"augmentation.{key}: mixes images with their labels, and objective.kind mae"
        ):
            load_recipe(PretrainConfig, "pretrain_mae_debug", [f"augmentation.{key}=0.5"])
    taught = ["objective.label_weight=0", "objective.teacher=timm:x", "augmentation.mixup_alpha=0.5"]
    load_recipe(PretrainConfig, "pretrain_distill_debug", taught)  # the teacher sees the mixed images


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
        PretrainConfig,
        "pretrain_mae_debug",
        ["optimizer.warmup=0", *([] if length.startswith("steps") else ["steps=null"]), length],
    )
    assert plan_steps(config, 160).steps == steps


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ["optimizer.warmup=30"],
            "optimizer.warmup 30: the run's 20 steps end before the learning rate reaches its peak",
        ),
        (["optimizer.warmup=20"], "optimizer.warmup 20: the run's 20 steps end before"),
        (["optimizer.warmup=21", "optimizer.schedule=constant"], "optimizer.warmup 21: the run's 20 steps end before"),
        (["profiling.steps=[100, 120]"], "profiling.steps [100, 120]: the run ends at step 20; say others"),
    ],
)
def test_what_would_never_come_into_effect_is_refused(settings, line):
    config = load_recipe(PretrainConfig, "pretrain_mae_debug", settings)
    with pytest.raises(InputError, match=re.escape(line)):
        plan_steps(config, 160)


@pytest.mark.parametrize("settings", [["optimizer.warmup=19"], ["optimizer.warmup=20", "optimizer.schedule=constant"]])
def test_a_peak_that_is_reached_at_all_is_planned(settings):
    assert plan_steps(load_recipe(PretrainConfig, "pretrain_mae_debug", settings), 160).steps == 20


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("splits={train: a.txt, tst: b.txt}", "--set splits: no such key `tst`; expected train, validation or test"),
        ("split_fractions={train: 0.5, tst: 0.5}", "--set split_fractions: no such key `tst`"),
        ("split_group=x", "--set split_group: no such key; did you mean `split.group`?"),
        ("split.group=[a-z]+", """if it is text, quote it: --set 'split.group="[a-z]+"'"""),
        ("split.group=[\\d]+", "if it is text, quote it: --set \"split.group='[\\d]+'\""),
    ],
)
def test_what_an_ingestion_is_told_wrongly_is_answered_with_what_was_meant(override, said):
    with pytest.raises(InputError) as error:
        validate(IngestConfig, apply_overrides({}, parse_overrides([override])), "--set")
    assert said in str(error.value)


def test_the_quoted_pattern_is_understood():
    assert parse_overrides(['split.group="[a-z]+"', r"split.group2='[\d]+'"]) == {
        "split.group": "[a-z]+", "split.group2": r"[\d]+",
    }  # fmt: skip
