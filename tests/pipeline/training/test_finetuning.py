"""Fine-tuning runs prepared as a person would and trained on real ranks: their heads, and what is made of the model."""

import hashlib
import os

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from flows.requests.evaluation import evaluation_run
from flows.requests.registration import registration_run
from pipeline.checkpoints.files import read_weights
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.rank import Rank
from pipeline.registry.locate import locate_model, unregistrable
from pipeline.registry.weights import load_model
from pipeline.run_directory import RunDirectory, read_json
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from pipeline.training.loop import initial_module
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.finetuned import exported, fine_tuning
from tests.pipeline.training.runs import new_run, recorded, train_until
from tests.ranks import run_on_ranks

PROBES = ("finetune_linear_mae_v1", "finetune_attentive_v1")
CLASSES = ("ant", "bee")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    fractions = {"train": 0.6, "validation": 0.2, "test": 0.2}
    return small_dataset(tmp_path_factory.mktemp("pictures"), splits="hash", split_fractions=fractions).directory


def evaluate_on_rank(run_path: str) -> None:
    from pipeline.evaluation.job import evaluate

    run, (rank, world_size) = RunDirectory(run_path), (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    evaluate(Rank(run, run.attempt(1).make(), rank, rank, world_size))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PROBES)
def test_a_probe_trains_on_two_ranks_is_evaluated_by_its_own_head_and_never_registered(tmp_path, pictures, recipe):
    model = exported(tmp_path / "model", CLASSES, pooling="mean")
    run = fine_tuning(tmp_path / "home" / "runs" / "probe", pictures, model, "micro_batch_size=3",
                      "profile.ranks_per_node=2", "validation.every_steps=3", recipe=recipe)  # fmt: skip
    assert run_on_ranks(train_until, 2, str(run.path), 1, 99) == ["done", "done"]
    home = tmp_path / "home"
    source = locate_model(str(run.path), tracking_uri="", home=home)
    assert source.head == read_run_config(run.path).objective.head.model_dump()
    weights, loaded = read_weights(run.newest_checkpoint()), load_model(source).state_dict()
    assert all(torch.equal(tensor, weights[f"encoder.{name}"]) for name, tensor in loaded.items())
    frozen = load_model(locate_model(model, tracking_uri="", home=home)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in frozen.items() if not name.startswith("head."))
    assert loaded["head.linear.weight"].any()
    with pytest.raises(InputError, match="is a probe's: timm's architectures have a linear head or none"):
        registration_run(str(run.path), "probe", home=home)
    scored = evaluation_run({"probe": str(run.path)}, data=str(pictures), protocols=["classify-v1"], profile="local",
                            overrides=["profile.ranks_per_node=1"], run_dir=None, home=home)  # fmt: skip
    run_on_ranks(evaluate_on_rank, 1, str(scored.path))
    assert any(key.endswith("/top1") for key in read_json(scored.result_file)["metrics"]["probe"])


def norm_statistics(micro: int) -> list[list[float]]:
    """On every rank: running statistics after two forwards of this rank's rows, and the variance of the last output."""
    import torch.distributed as dist

    from models.encoders.heads import BatchNorm

    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    norm, generator = BatchNorm(3), torch.Generator().manual_seed(rank)
    for _ in range(2):
        out = norm(torch.randn(micro, 3, generator=generator) * (rank + 1))
    dist.barrier()
    return [part.tolist() for part in (norm.running_mean, norm.running_var, out.var(dim=0, correction=0))]


def test_running_statistics_are_the_mean_over_ranks_and_equal_on_all_of_them():
    mine, others = ([torch.tensor(part) for part in parts] for parts in run_on_ranks(norm_statistics, 2, 8))
    (mean, variance, own), (others_mean, others_variance, others_own) = mine, others
    assert torch.equal(mean, others_mean) and torch.equal(variance, others_variance)
    expected_mean, expected_variance = torch.zeros(3), torch.ones(3)
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for _ in range(2):
        rows = [torch.randn(8, 3, generator=generator) * (rank + 1) for rank, generator in enumerate(generators)]
        expected_mean.lerp_(torch.stack([part.mean(dim=0) for part in rows]).mean(dim=0), 0.1)
        expected_variance.lerp_(torch.stack([part.var(dim=0) for part in rows]).mean(dim=0), 0.1)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, expected_variance)
    torch.testing.assert_close(own, torch.ones(3), rtol=1e-4, atol=1e-4)  # normalised by a rank's own
    torch.testing.assert_close(others_own, torch.ones(3), rtol=1e-4, atol=1e-4)


def test_a_batch_norm_of_one_image_is_refused(tmp_path, pictures):
    model = exported(tmp_path / "model", CLASSES)
    with pytest.raises(InputError, match="micro_batch_size 1: a BatchNorm"):
        fine_tuning(tmp_path / "run", pictures, model, "micro_batch_size=1", recipe="finetune_linear_mae_v1")


@pytest.mark.slow
def test_a_model_of_timm_is_fine_tuned_with_the_normalisation_and_crop_of_its_own_images(tmp_path, pictures):
    settings = ("encoder.depth=1", "encoder.embed_dim=48", "encoder.num_heads=3", "encoder.image_size=32")
    run = fine_tuning(tmp_path / "run", pictures, "timm:vit_tiny_patch16_224.augreg_in21k", *settings)
    data, source = read_run_config(run.path).data, run.plan()["initialise_from"]
    assert data.mean == data.std == (0.5, 0.5, 0.5) and data.evaluation_crop == 0.9
    assert source["mean"] == source["std"] == [0.5, 0.5, 0.5]
    given = fine_tuning(
        tmp_path / "given", pictures, "timm:vit_tiny_patch16_224.augreg_in21k", *settings, "data.mean=[0.1,0.1,0.1]"
    )
    assert read_run_config(given.path).data.mean == (0.1, 0.1, 0.1)
    with pytest.raises(InputError, match="MODEL `timm:vit_tiny_patch16_224.nothing`: Invalid pretrained tag"):
        fine_tuning(tmp_path / "none", pictures, "timm:vit_tiny_patch16_224.nothing")


@pytest.mark.parametrize(("patch", "pixels"), [(16, 384), (16, 448), (14, 518)])
def test_a_fine_tune_starts_from_the_models_weights_a_head_at_zero_and_positions_of_the_higher_resolution(
    tmp_path, pictures, patch, pixels
):
    model = exported(tmp_path / "model", ("a", "b", "c"), image_size=224, patch_size=patch, depth=1)
    run = fine_tuning(tmp_path / "run", pictures, model, f"encoder.image_size={pixels}", "encoder.pooling=token")
    config = read_run_config(run.path)
    started = initial_module(config, run.plan()).encoder
    trained = load_model(locate_model(model, tracking_uri="", home=tmp_path))
    assert not started.head.weight.any() and not started.head.bias.any() and started.head.out_features == 2
    expected = resample_abs_pos_embed(trained.pos_embed, [pixels // patch, pixels // patch], num_prefix_tokens=1)
    torch.testing.assert_close(started.pos_embed, expected)
    others = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith(("head", "pos_"))}
    assert all(torch.equal(started.state_dict()[name], tensor) for name, tensor in others.items())
    assert started(torch.randn(1, 3, pixels, pixels)).shape == (1, 2)


def test_another_pooling_begins_with_a_norm_of_its_own_as_maes_fine_tune_does(tmp_path, pictures):
    model = exported(tmp_path / "model", CLASSES, pooling="token")
    run = fine_tuning(tmp_path / "run", pictures, model)  # the recipe pools by the mean
    started = initial_module(read_run_config(run.path), run.plan()).encoder
    assert started.global_pool == "avg" and isinstance(started.norm, torch.nn.Identity)
    assert (started.fc_norm.weight == 1).all() and (started.fc_norm.bias == 0).all()


@pytest.mark.slow
def test_a_supervised_pretraining_loses_its_representation_head_and_keeps_what_it_learned(tmp_path, pictures):
    small = [f"encoder.{key}={value}" for key, value in {"image_size": 16, "patch_size": 4, "depth": 2}.items()]
    parent = new_run(tmp_path, str(pictures), *small, "encoder.representation=true", "steps=2", ranks=1,
                     recipe="pretrain_supervised_debug")  # fmt: skip
    assert run_on_ranks(train_until, 1, str(parent.path), 1, 99) == ["done"]
    assert "encoder.head_drop.fc.weight" in read_weights(parent.newest_checkpoint())
    run = fine_tuning(tmp_path / "child", pictures, str(parent.path))
    config = read_run_config(run.path)
    started = initial_module(config, run.plan()).encoder
    assert not config.encoder.representation and isinstance(started.head_drop, torch.nn.Module)
    assert not [name for name, _ in started.named_parameters() if name.startswith("head_drop")]
    weights = read_weights(parent.newest_checkpoint())
    assert torch.equal(started.blocks[1].mlp.fc2.weight, weights["encoder.blocks.1.mlp.fc2.weight"])
    assert not started.head.weight.any() and weights["encoder.head.weight"].any()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["data.label_fraction=0.25", "data.max_samples=7"])
def test_a_part_of_the_labels_is_all_that_a_fine_tune_sees(tmp_path, pictures, setting):
    model = exported(tmp_path / "model", CLASSES)
    run = fine_tuning(tmp_path / "run", pictures, model, setting, "data.record=true", "steps=9", "micro_batch_size=2")
    index = read_index(pictures)
    reader = ShardReader(index, "train")
    keys = [key for shard in range(len(reader.shard_sizes)) for key in reader.keys(shard)]
    labels = [label for shard in range(len(reader.shard_sizes)) for label in reader.labels(shard)]
    expected = 7 if "max" in setting else sum(round(0.25 * labels.count(label)) for label in (0, 1))
    assert run.plan()["samples_per_epoch"] == expected < len(keys)
    assert run_on_ranks(train_until, 1, str(run.path), 1, 99) == ["done"]
    seen = [key for _, key in recorded(run)]
    lowest = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:7]
    assert len(seen) == 54 and len(set(seen)) == expected
    assert "max" not in setting or set(seen) == set(lowest)


@pytest.mark.slow
def test_a_fine_tune_learns_from_a_teacher_too_and_is_a_model_like_any_other(tmp_path, pictures):
    model = exported(tmp_path / "model", ("a", "b", "c"))
    teacher = exported(tmp_path / "teacher", CLASSES, depth=1)
    settings = ("objective.kind=distill", f"objective.teacher={teacher}", "profile.ranks_per_node=2",
                "micro_batch_size=2", "global_batch_size=8", "zero.stage=2")  # fmt: skip
    run = fine_tuning(tmp_path / "run", pictures, model, *settings)
    assert run_on_ranks(train_until, 2, str(run.path), 1, 99) == ["done", "done"]
    source = locate_model(str(run.path), tracking_uri="", home=tmp_path)
    assert (source.classes, source.objective, source.lineage["teacher"]) == (CLASSES, "distill", teacher)
    assert unregistrable(source) is None and load_model(source)(torch.randn(1, 3, 16, 16)).any()


def test_a_fine_tune_without_labels_or_with_a_teacher_of_other_classes_is_refused(tmp_path, pictures):
    model, distill = exported(tmp_path / "model", ("a", "b", "c")), "objective.kind=distill"
    with pytest.raises(InputError, match="label_weight 0: fine-tuning learns the labels"):
        fine_tuning(tmp_path / "1", pictures, model, distill, f"objective.teacher={model}", "objective.label_weight=0")
    with pytest.raises(InputError, match="knows 3 classes, and the labels are of 2"):
        fine_tuning(tmp_path / "2", pictures, model, distill, f"objective.teacher={model}")
    with pytest.raises(InputError, match="objective.teacher: missing"):
        fine_tuning(tmp_path / "3", pictures, model, distill)
    with pytest.raises(InputError, match="objective.kind: expected supervised or distill"):
        fine_tuning(tmp_path / "4", pictures, model, "objective.kind=mae")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear_batchnorm", "attentive"])
def test_a_probes_head_is_partitioned_stopped_and_resumed_without_a_change(tmp_path, pictures, head):
    """Under ZeRO-3 with all parameters training; statistics of a BatchNorm are state too."""
    model = exported(tmp_path / "model", CLASSES)
    settings = (f"objective.head.kind={head}", "zero.stage=3", "profile.ranks_per_node=2", "micro_batch_size=2",
                "global_batch_size=8", "steps=4")  # fmt: skip
    runs = [fine_tuning(tmp_path / f"run-{number}", pictures, model, *settings) for number in range(2)]
    assert run_on_ranks(train_until, 2, str(runs[0].path), 1, 99) == ["done", "done"]
    assert "checkpoint complete" in run_on_ranks(train_until, 2, str(runs[1].path), 1, 2)[0]
    assert run_on_ranks(train_until, 2, str(runs[1].path), 2, 99) == ["done", "done"]
    whole, parts = (read_weights(run.newest_checkpoint()) for run in runs)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    if head == "linear_batchnorm":
        assert whole["encoder.head.norm.running_mean"].any()
