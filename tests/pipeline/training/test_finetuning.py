"""Fine-tuning runs prepared as a person would and trained on real ranks: their heads, and what is made of the model."""

import os

import pytest
import torch

from flows.requests.evaluation import evaluation_run
from flows.requests.registration import registration_run
from pipeline.checkpoints.files import read_weights
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.rank import Rank
from pipeline.registry.locate import locate_model
from pipeline.registry.weights import load_model
from pipeline.run_directory import RunDirectory, read_json
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.finetuned import exported, fine_tuning
from tests.pipeline.training.runs import train_until
from tests.ranks import run_on_ranks

PROBES = ("finetune_linear_mae_v1", "finetune_attentive_v1")
CLASSES = ("ant", "bee")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    fractions = {"train": 0.6, "validation": 0.2, "test": 0.2}
    return small_dataset(tmp_path_factory.mktemp("pictures"), splits="hash", split_fractions=fractions).directory


def evaluate_on_rank(run_path: str) -> None:
    from pipeline.evaluation.protocols import evaluate

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
