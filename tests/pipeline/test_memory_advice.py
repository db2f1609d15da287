"""Whether a run fits, which stage is the lowest that does, and what to change where it does not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from flows.requests.training import prepared_training
from pipeline.preparation import memory
from pipeline.preparation.placement import Placement

GPUS = Placement("local", 1, 8, 4, 8)


@pytest.fixture
def large(digits, home):
    """ViT-L at stage 1 with micro-batches of 16, planned for eight accelerators."""
    return prepared(digits, home)


def prepared(digits, home, *more):
    overrides = ["global_batch_size=128", "micro_batch_size=16", *more]
    return prepared_training(
        "pretrain", "pretrain_supervised_vit_l16", data=[str(digits)], placement=GPUS, overrides=overrides,
        home=home, rehearse="never", model=None,
    )  # fmt: skip


def on_devices_of(monkeypatch, gibibytes: float) -> None:
    monkeypatch.setattr(memory, "smallest_accelerator_bytes", lambda: int(gibibytes * 2**30 / memory.HEADROOM))


def test_the_lowest_stage_that_fits_is_advised(large, monkeypatch):
    small = {"micro_batch_size": 2, "global_batch_size": 16}
    large = replace(large, config=memory.changed(large.config, small))
    need = [memory.needed_bytes(large, GPUS, {"zero.stage": stage}) / 2**30 for stage in range(4)]
    assert need[0] > need[1] > need[2]
    for stage in range(3):
        on_devices_of(monkeypatch, need[stage] + 0.01)
        assert memory.lowest_stage_that_fits(large, GPUS) == stage
        assert (memory.memory_shortage(large, GPUS) is None) == (stage < 2)
    assert "what fits: zero.stage=2, or zero.offload_optimizer=cpu" in memory.memory_shortage(large, GPUS)


@pytest.mark.parametrize(
    ("gibibytes", "advice"),
    [
        (3.0, "what fits: micro_batch_size=8, or activation_checkpointing=true"),
        (2.0, "what fits: activation_checkpointing=true"),
        (1.5, "what fits: zero.stage=2 with activation_checkpointing=true, or micro_batch_size=2 with"),
        (1.0, "what fits: zero.stage=2 with activation_checkpointing=true and zero.offload_optimizer=cpu"),
        (0.7, "the nearest that fits is encoder.name=vit_s16"),
    ],
)
def test_the_fewest_settings_that_fit_are_advised(large, monkeypatch, gibibytes, advice):
    on_devices_of(monkeypatch, gibibytes)
    assert advice in memory.memory_shortage(large, GPUS)


@pytest.mark.parametrize("gibibytes", [0.4, 0.5, 0.6, 0.7])
def test_the_encoder_that_is_advised_fits(large, monkeypatch, gibibytes, digits, home):
    on_devices_of(monkeypatch, gibibytes)
    advised = memory.memory_shortage(large, GPUS).rpartition("fits is ")[2]
    smaller = prepared(digits, home, advised)
    assert memory.needed_bytes(smaller, GPUS) <= memory.available_bytes_per_rank(GPUS)


def test_nothing_is_said_of_accelerators_that_nobody_can_ask(large, monkeypatch):
    monkeypatch.setattr(memory, "smallest_accelerator_bytes", lambda: None)
    assert memory.lowest_stage_that_fits(large, GPUS) is None and memory.memory_shortage(large, GPUS) is None
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**34))
    assert memory.available_bytes_per_rank(Placement("local", 1, 2, 1, 0)) == 2**33


@pytest.mark.parametrize(
    ("kind", "never"), [("head", "activation_checkpointing"), ("adalora", "zero.stage"), ("lora", "nothing")]
)
def test_a_tuning_is_advised_what_it_can_take(kind, never, digits, home, monkeypatch):
    tuned = prepared_training(
        "finetune", "finetune_vit", data=[str(digits)], placement=GPUS, home=home, rehearse="never",
        overrides=[f"tuning.kind={kind}", "zero.stage=0"], model="timm:vit_large_patch16_224",
    )  # fmt: skip
    need = memory.needed_bytes(tuned, GPUS) / 2**30
    on_devices_of(monkeypatch, 0.97 * need)
    assert memory.memory_shortage(tuned, GPUS)
    advice = "; ".join(memory._words(changes) for changes in memory._changes(tuned.config))
    assert never not in advice and "micro_batch_size" in advice
    if kind == "lora":
        assert "activation_checkpointing=true" in advice and "zero.stage=3" in advice
