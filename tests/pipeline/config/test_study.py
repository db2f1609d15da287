"""A study's file: what it may say, and one line for what it may not."""

import pytest

from models.encoders.config import EncoderConfig
from models.encoders.timm_config import TimmEncoderConfig
from pipeline.config.recipe import apply_overrides, validate
from pipeline.config.study import STUDIES, StudyConfig, read_study, study_path
from pipeline.errors import InputError

RAW = {
    "name": "birds", "data": "/data/birds", "fractions": [1.0, 0.1],
    "networks": {"ViT": "vit_s16", "ResNet": "timm:resnet18", "other": "timm:vit_tiny_patch16_224"},
    "objectives": {"supervised": "pretrain_supervised_vit_s16"},
}  # fmt: skip


def test_names_alone_stand_for_networks_and_recipes_and_amounts_are_in_order():
    study = validate(StudyConfig, RAW, "birds.yaml")
    assert study.fractions == (0.1, 1.0) and study.seeds == (0,) and study.lengths == (1.0,)
    assert isinstance(study.networks["ResNet"].encoder, TimmEncoderConfig)
    assert isinstance(study.networks["other"].encoder, EncoderConfig)  # a plain ViT of timm's is ours
    assert study.objectives["supervised"].recipe == "pretrain_supervised_vit_s16"
    assert study.downstream.scored_by == "linear-cached-v1"
    nested = validate(StudyConfig, RAW | {"set": {"optimizer": {"warmup": 3}, "profile.env": {"A": "b"}}}, "birds.yaml")
    assert nested.set == {"optimizer.warmup": 3, "profile.env.A": "b"}  # beside what a recipe says, never instead of it
    assert StudyConfig.model_validate(study.model_dump(mode="json")) == study


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"fraction": [1]}, "birds.yaml: fraction: no such key; did you mean `fractions`?"),
        (
            {"fractions": [0.1, 1.5]},
            "birds.yaml: fractions: expected a list, each a number above 0 and at most 1 (got [0.1, 1.5])",
        ),
        ({"fractions": [0.1, 0.1]}, "birds.yaml: fractions: each value once (got [0.1, 0.1])"),
        ({"networks": {}}, "birds.yaml: networks: "),
        ({"networks.ViT": {"encoder": {"name": "vit_zz16"}}}, "birds.yaml: networks.ViT.encoder"),
        ({"networks.a/b": "vit_s16"}, "birds.yaml: networks"),
        ({"set": {"encoder.depth": 2}}, "set: encoder.depth is what cells differ in"),
        ({"set": {"seed": 2}}, "set: seed is what cells differ in"),
        (
            {"objectives.supervised": {"recipe": "r", "set": {"data.label_fraction": 0.5}}},
            "objectives.supervised.set: data.label_fraction is",
        ),
        ({"networks.ViT": {"encoder": {"name": "vit_s16"}, "set": {"profile.nodes": 2}}}, "all runs go to one profile"),
        ({"networks.ViT": {"encoder": {"name": "vit_s16"}, "set": {"steps": 2}}}, "compared after as many images"),
        ({"downstream": {"protocol": "knn-20-v1", "recipe": "finetune_small"}}, "say one"),
        ({"downstream": {"protocol": "linear-v1"}}, "did you mean `linear-mae-v1`"),
        ({"downstream": {"protocol": "segment-linear-v1"}}, "ends in no top-1"),
        ({"downstream": {"set": {"steps": 3}}}, "settings are those of a fine-tuning recipe, and there is none"),
    ],
)
def test_what_a_study_may_not_say_is_one_line(settings, line):
    with pytest.raises(InputError) as refused:
        validate(StudyConfig, apply_overrides(RAW, settings), "birds.yaml")
    (problem,) = refused.value.problems
    assert line in problem


def test_a_study_is_found_by_its_file_or_its_shipped_name(tmp_path):
    with pytest.raises(
        InputError, match="study `images_of_32_pixel` does not exist; did you mean `images_of_32_pixels`"
    ):
        study_path("images_of_32_pixel")
    (tmp_path / "birds.txt").touch()
    with pytest.raises(InputError, match="birds.txt`: a study is a file whose name ends in .yaml"):
        study_path(str(tmp_path / "birds.txt"))
    with pytest.raises(InputError, match="data: missing, and it has no default; expected text"):
        validate(StudyConfig, read_study(study_path("images_of_32_pixels")), "images_of_32_pixels.yaml")
    for path in STUDIES.glob("*.yaml"):
        assert validate(StudyConfig, read_study(path) | {"data": "/data"}, path.name).name == path.stem
