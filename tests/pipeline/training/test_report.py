"""What a run says of itself: a start table, progress in human units, the parts of a step, and slow ranks by name."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_objective
from models.config import EncoderConfig, MaskedAutoencoderConfig, SupervisedConfig
from models.objectives.batch import Batch
from pipeline.config.plan import training_flops
from pipeline.run_directory import RunDirectory
from pipeline.telemetry.clock import PARTS, StepClock
from pipeline.telemetry.speed import SpeedMeter, peak_of_device, peak_of_name
from pipeline.telemetry.stragglers import WINDOWS, Stragglers
from pipeline.words import bytes_in_words, duration_in_words, number_in_words
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.test_validation import ledger_of, new_run, this_rank
from tests.ranks import run_on_ranks

OBJECTIVES = [SupervisedConfig(), MaskedAutoencoderConfig()]


def counted_flops(encoder: EncoderConfig, objective, batch: int) -> float:
    """What torch counts of forward and backward, per image; attention by its plain products."""
    module = build_objective(objective, encoder, num_classes=1000, seed=0)
    images = torch.randn(batch, 3, *encoder.input_size)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        module(Batch(images, torch.zeros(batch, dtype=torch.int64), torch.arange(batch))).loss.backward()
    return counter.get_total_flops() / batch


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["supervised", "mae"])
@pytest.mark.parametrize("name", ["vit_ti16", "vit_s16"])
def test_the_flops_of_a_training_image_are_those_that_torch_counts(name, objective):
    encoder = EncoderConfig(name=name)
    assert training_flops(encoder, objective, 1000) == pytest.approx(counted_flops(encoder, objective, 2), rel=0.02)


def test_the_flops_of_large_models_are_those_of_the_formula():
    encoder = EncoderConfig(name="vit_l16")
    macs = 24 * (12 * 197 * 1024**2 + 2 * 197**2 * 1024) + 196 * 768 * 1024 + 1024 * 1000
    assert training_flops(encoder, SupervisedConfig(), 1000) == pytest.approx(6 * macs, rel=1e-3)
    assert training_flops(encoder, SupervisedConfig(), 1000) == pytest.approx(369.3e9, rel=2e-3)
    assert training_flops(encoder, MaskedAutoencoderConfig(), 0) == pytest.approx(124.5e9, rel=2e-3)


def test_a_device_without_a_known_peak_has_no_mfu(monkeypatch):
    assert peak_of_name("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_of_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of_name("NVIDIA L40S") == 362e12
    assert peak_of_name("NVIDIA RTX A1000") is None and peak_of_name("NVIDIA A10G") is None
    assert peak_of_device("bf16") is None or torch.cuda.is_available()
    plan = {"batches": {"global_batch_size": 64, "world_size": 2}, "training_flops_per_image": 5e9, "precision": "bf16"}
    meter = SpeedMeter(plan, last_step=10)
    meter.peak = None
    meter.add(0.5, 0.05, dict.fromkeys(PARTS, 0.1))
    assert "perf/mfu" not in meter.figures(1)
    meter.peak = 4e12
    figures = meter.figures(1)
    assert figures["perf/mfu"] == pytest.approx(64 * 5e9 / 0.5 / (2 * 4e12))
    assert figures["perf/seconds_left"] == 4.5 and figures["perf/data_wait_share"] == 0.1


def test_the_parts_of_a_step_add_up_to_it():
    clock, started = StepClock(torch.device("cpu"), lambda part: None), time.perf_counter()
    for part, seconds in (("data", 0.02), ("forward", 0.01), ("data", 0.02), ("update", 0.03)):
        clock.begin(part)
        time.sleep(seconds)
    clock.end()
    whole = time.perf_counter() - started
    time.sleep(0.05)  # what comes after the step is not of it
    parts = clock.seconds()
    assert sum(parts.values()) == pytest.approx(whole, abs=0.005)
    assert parts["data"] >= 0.04 and parts["update"] >= 0.03 and parts["backward"] == 0.0
    assert clock.seconds() == dict.fromkeys(PARTS, 0.0)


def test_sizes_and_durations_are_told_in_two_units_at_most():
    assert [duration_in_words(seconds) for seconds in (0, 45.4, 200, 3600, 8000, 108000, 59.7, 4e9)] == [
        "0 s", "45 s", "3 min 20 s", "1 h", "2 h 13 min", "1 d 6 h", "1 min", "126 y 274 d",
    ]  # fmt: skip
    assert bytes_in_words(512 * 2**20) == "512.0 MiB" and bytes_in_words(3.25 * 2**30) == "3.25 GiB"


def test_numbers_are_told_in_three_digits_and_without_an_exponent():
    told = [number_in_words(number) for number in (0, 3.15e-05, 0.0123, 0.35, 12.34, 99.96, 1050.4, 2.5e7)]
    assert told == ["0", "less than 0.01", "0.0123", "0.35", "12.3", "100", "1,050", "25,000,000"]


def test_a_rank_is_named_once_it_was_slow_for_several_windows_in_a_row():
    stragglers = Stragglers(0, 1, torch.device("cpu"))
    stragglers.hosts, stragglers.slow_windows = ["a", "b", "c", "d"], [0] * 4
    slow, even = [0.10, 0.11, 0.30, 0.10], [0.10, 0.11, 0.11, 0.10]
    assert [stragglers.named(slow, 0.4) for _ in range(WINDOWS - 1)] == [[]] * (WINDOWS - 1)
    (line,) = stragglers.named(slow, 0.4)
    assert line.startswith("rank 2 on c holds up the others: 0.3 s of data and forward")
    assert stragglers.named(even, 0.4) == [] and stragglers.named(slow, 0.4) == []
    assert all(stragglers.named(slow, 10.0) == [] for _ in range(9))  # slow, and too little of a step to matter


def train_with_a_slow_rank(run_path: str) -> None:
    from pipeline.training.loop import train
    from pipeline.training.supply import Supply

    me = this_rank(RunDirectory(run_path))
    os.dup2(os.open(me.attempt.log(me.rank), os.O_WRONLY | os.O_CREAT), 1)
    draw = Supply.draw

    def slow_draw(supply, loader):
        time.sleep(0.1)
        return draw(supply, loader)

    if me.rank == 1:
        Supply.draw = slow_draw
    train(me)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_tells_its_table_its_progress_and_which_rank_holds_it_up(stage, tmp_path):
    small_dataset(tmp_path, per_class=25, splits="hash", split_fractions={"train": 0.6, "validation": 0.4})
    run = new_run(
        tmp_path, str(tmp_path / "dataset"), "mae", f"zero.stage={stage}", "steps=10", "log_every_steps=2", ranks=2
    )  # fmt: skip
    run_on_ranks(train_with_a_slow_rank, 2, str(run.path))
    told = Path(run.attempt(1).log(0)).read_text()
    for words in ("mae: 0.0", "images      37 of dataset, 16 x 16 pixels", "12 = 2 ranks x 2 images x 3 accumulated",
                  "10 steps = 3.243 epochs = 120 images", "warm-up 1 steps, then cosine", "step 10/10  loss",
                  "saved step-00000010", "validation at step 8: loss", "0 s left"):  # fmt: skip
        assert words in told, words
    assert "rank 1 on" in told and "holds up the others" in told and "rank 0 on" not in told
    assert "MFU" not in told or torch.cuda.is_available()
    for line in ledger_of(run)[2:]:
        parts = sum(line[f"perf/{part}_seconds"] for part in PARTS)
        assert parts == pytest.approx(line["perf/step_seconds"], rel=0.25), json.dumps(line)
        assert line["perf/update_seconds"] > 0 and line["perf/backward_seconds"] > 0
