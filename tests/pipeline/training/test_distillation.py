"""A run that learns from another model: where the teacher is found, what the plan says of it, and who cannot teach."""

import json

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from models.encoders.config import EncoderConfig
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.registry.locate import ModelSource, locate_model
from pipeline.registry.weights import load_model, load_teacher
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import read_index
from pipeline.training.loop import initial_module
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.finetuned import exported, fine_tuning
from tests.pipeline.training.runs import new_run, train_until
from tests.ranks import run_on_ranks

STUDENT = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return small_dataset(tmp_path_factory.mktemp("pictures"))


def located(reference: str, tmp_path) -> ModelSource:
    return locate_model(reference, tracking_uri=f"sqlite:///{tmp_path}/m.db", home=tmp_path)


def student(tmp_path, pictures, teacher: str, *settings: str) -> RunDirectory:
    return new_run(
        tmp_path, str(pictures.directory), f"objective.teacher={teacher}", "micro_batch_size=6", "steps=3", *settings,
        recipe="pretrain_distill_debug",
    )  # fmt: skip


@pytest.mark.slow
def test_a_student_learns_from_another_model_alone_and_names_it_as_its_teacher(tmp_path, pictures):
    teacher = exported(tmp_path / "teacher", ("a", "b", "c", "d"))
    run = student(tmp_path, pictures, teacher, "zero.stage=3")
    config, plan = read_run_config(run.path), run.plan()
    assert config.objective.teacher == teacher == json.loads(run.provenance_file.read_text())["teacher"]
    assert (config.objective.teacher_encoder.depth, config.objective.teacher_classes) == (2, 4)
    assert plan["num_classes"] == 0 and plan["parameters"] == sum(
        parameter.numel() for parameter in initial_module(config, plan).parameters()
    )
    assert run_on_ranks(train_until, 2, str(run.path), 1, 99) == ["done", "done"]
    source = located(str(run.path), tmp_path)
    assert (source.num_classes, source.objective, source.lineage["teacher"]) == (0, "distill", teacher)


def test_any_architecture_of_timm_teaches_and_sees_what_it_was_trained_on(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=6).eval()
    save_for_hf(network, str(tmp_path / "resnet"), safe_serialization=True)
    teacher = load_teacher(located(str(tmp_path / "resnet"), tmp_path), **STUDENT)
    assert teacher.num_classes == 6 and teacher.input_size == tuple(network.pretrained_cfg["input_size"][1:])
    pixels = torch.rand(1, 3, *teacher.input_size)
    own = [torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std")]
    here = [torch.tensor(STUDENT[name]).view(3, 1, 1) for name in ("mean", "std")]
    expected = network((pixels - own[0]) / own[1])
    torch.testing.assert_close(teacher((pixels - here[0]) / here[1]), expected, atol=1e-4, rtol=1e-3)


def test_a_teacher_of_other_classes_or_channels_or_without_a_head_is_refused(tmp_path, pictures):
    other = exported(tmp_path / "other", ("a", "b", "c", "d"))
    with pytest.raises(InputError, match="knows 4 classes, and the labels are of .* objective.label_weight=0"):
        student(tmp_path, pictures, other, "objective.label_weight=0.5")
    headless = exported(tmp_path / "headless", ())
    with pytest.raises(InputError, match="has no head to learn from"):
        load_teacher(located(headless, tmp_path), **STUDENT)
    with pytest.raises(InputError, match="headless: has no head to learn from; fine-tune it first"):
        student(tmp_path, pictures, headless)
    with pytest.raises(InputError, match="model.safetensors: weights alone do not say which network"):
        student(tmp_path, pictures, f"{other}/model.safetensors")
    grey = exported(tmp_path / "grey", ("a", "b"), channels=1)
    with pytest.raises(InputError, match="sees images of 1 channels, and encoder.channels is 3"):
        student(tmp_path, pictures, grey)
    with pytest.raises(InputError, match="objective.teacher: MODEL `.*nowhere` does not exist"):
        student(tmp_path, pictures, "nowhere")


def test_an_encoder_with_a_distillation_token_is_registered_as_timm_has_it_and_loads_with_timm_alone(tmp_path):
    directory = exported(tmp_path / "distilled", ("a", "b"), distillation_token=True)
    alone = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    assert type(alone).__name__ == "VisionTransformerDistilled"
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_model(located(directory, tmp_path))(images), alone(images))
    assert load_teacher(located(directory, tmp_path), **STUDENT).num_classes == 2


def test_images_of_other_channels_than_the_models_are_normalised_by_their_own_statistics(tmp_path, pictures):
    model = exported(tmp_path / "grey", ("a", "b"), channels=1)
    data = read_run_config(fine_tuning(tmp_path / "run", pictures.directory, model, "encoder.channels=3").path).data
    own = read_index(pictures.directory).statistics
    assert (data.mean, data.std) == (own.mean, own.std)


def test_a_distilled_model_is_fine_tuned_by_both_its_tokens_whatever_the_recipe_pools(tmp_path, pictures):
    directory = exported(tmp_path / "distilled", ("a", "b"), distillation_token=True)

    def fine_tuned(number: int, *more: str) -> EncoderConfig:
        run = fine_tuning(tmp_path / f"run-{number}", pictures.directory, directory, *more)
        return read_run_config(run.path).encoder

    encoder = fine_tuned(1)
    assert encoder.distillation_token and encoder.pooling == "token"
    plain = fine_tuned(2, "encoder.distillation_token=false")
    assert not plain.distillation_token and plain.pooling == "mean"
    with pytest.raises(InputError, match="pooling is mean; set it to token, or distillation_token to false"):
        fine_tuned(3, "encoder.pooling=mean")
