"""The same training in one process of plain PyTorch and through the engine, at every stage and in every split.

Bounds of fp32 at AdamW's eps of 1e-6: loss 2e-6, gradient norm 2e-5, weights and their average 5e-6 after 20 steps.
What is left is the order of sums. bf16 has its own: see `test_bf16_follows_fp32`. All of this is on processors; on
accelerators kernels choose their own order of sums, and the same bits twice need `deterministic: true`.
"""

import pytest

from tests.pipeline.training.equivalence_cases import (
    Training,
    collected,
    setting,
    train_on_ranks,
    train_plainly,
)
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow
MIXED = ("augmentation.mixup_alpha=0.8", "augmentation.cutmix_alpha=1.0")


def trained(ranks: int, settings: dict, folder) -> dict[str, Training]:
    return collected(run_on_ranks(train_on_ranks, ranks, settings, str(folder), timeout_seconds=600)[0], str(folder))


def worst(ours, theirs) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


def assert_equal(name: str, ours: Training, plain: Training) -> None:
    loss, norm = furthest(ours.losses, plain.losses), furthest(ours.norms, plain.norms)
    weights, average = worst(ours.weights, plain.weights), worst(ours.average, plain.average)
    print(f"{name}: loss {loss:.1e}, norm {norm:.1e}, weights {weights:.1e}, average {average:.1e}")
    assert loss < 2e-6 and norm < 2e-5 and weights < 5e-6 and average < 5e-6, name
    assert ours.rates == plain.rates, name  # the very same numbers


def furthest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def plain():
    return train_plainly(setting(0))


def test_every_stage_trains_as_plain_pytorch_does(plain, tmp_path):
    settings = {f"stage-{stage}": setting(stage) for stage in range(4)}
    settings |= {f"offload-{stage}": setting(stage, "zero.offload_optimizer=cpu") for stage in (1, 2, 3)}
    settings |= {f"recomputed-{stage}": setting(stage, "activation_checkpointing=true") for stage in range(4)}
    for name, training in trained(2, settings, tmp_path).items():
        assert_equal(name, training, plain)
    assert max(plain.norms) > 1.0  # the clip value was reached


def test_every_split_of_a_batch_is_the_same_step(tmp_path):
    """Mixup, CutMix and drop path follow the positions of the samples."""
    plain = train_plainly(setting(0, *MIXED))
    assert worst(plain.weights, train_plainly(setting(0)).weights) > 1e-3  # mixing did something
    one = {f"1x32-{stage}": setting(stage, "micro_batch_size=32", *MIXED) for stage in (0, 1)}
    one |= {f"1x8-{stage}": setting(stage, "micro_batch_size=8", *MIXED) for stage in (0, 1)}
    two = {f"2x16-{stage}": setting(stage, "micro_batch_size=16", *MIXED) for stage in (0, 2)}
    two |= {f"2x4-{stage}": setting(stage, "micro_batch_size=4", *MIXED) for stage in (0, 1, 2, 3)}
    for name, training in (trained(1, one, tmp_path) | trained(2, two, tmp_path)).items():
        assert_equal(name, training, plain)


def test_three_ranks_train_as_one(tmp_path):
    batch = ("global_batch_size=24", "micro_batch_size=4")
    plain = train_plainly(setting(0, *batch))
    for name, training in trained(3, {f"{stage}": setting(stage, *batch) for stage in range(4)}, tmp_path).items():
        assert_equal(name, training, plain)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.max_grad_norm=0", "optimizer.layer_decay=0.75"),
        ("optimizer.kind=sgd", "optimizer.learning_rate=0.05"),
        ("optimizer.kind=lamb", "optimizer.learning_rate=0.001"),
        ("optimizer.kind=lars", "optimizer.learning_rate=1", "optimizer.weight_decay=0.01"),
    ],
    ids=["no clipping, layer decay", "sgd", "lamb", "lars"],
)
def test_every_optimizer_changes_the_weights_as_plain_pytorch_does(overrides, tmp_path):
    whole = any(kind in overrides[0] for kind in ("lamb", "lars"))
    settings = {f"stage-{stage}": setting(stage, *overrides) for stage in ((0,) if whole else range(4))}
    plain = train_plainly(setting(0, *overrides))
    for name, training in trained(2, settings, tmp_path).items():
        assert_equal(name, training, plain)


def test_a_compiled_network_trains_as_it_does_uncompiled(plain, tmp_path):
    settings = {f"stage-{stage}": setting(stage, "compile=true") for stage in (0, 2, 3)}
    settings["recomputed"] = setting(3, "compile=true", "activation_checkpointing=true")
    for name, training in trained(2, settings, tmp_path).items():
        assert_equal(name, training, plain)


def test_bf16_follows_fp32(plain, tmp_path):
    """Losses within 5e-3 (1e-2 in all), weights and their fp32 average within the noise of as many Adam steps."""
    settings = {f"stage-{stage}": setting(stage, "precision=bf16") for stage in range(4)}
    for name, training in trained(2, settings, tmp_path).items():
        loss, weights = furthest(training.losses, plain.losses), worst(training.weights, plain.weights)
        average = worst(training.average, plain.average)
        print(f"{name}: loss {loss:.1e}, weights {weights:.1e}, average {average:.1e}")
        assert loss < 5e-3 and weights < 1e-2 and average < 1e-2, name
        assert training.rates == plain.rates, name
        assert any((w != w.bfloat16().float()).any() for w in training.average.values()), name  # not of bf16 weights
