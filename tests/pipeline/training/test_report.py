"""What a run says of itself: a start table, progress in human units, the parts of a step, and slow ranks by name."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.objectives.batch import Batch
from models.objectives.config import MaskedAutoencoderConfig, SupervisedConfig
from pipeline.config.plan import plan_steps, training_flops
from pipeline.config.recipe import apply_overrides, parse_overrides, read_yaml, recipe_path, validate
from pipeline.config.training import PretrainConfig
from pipeline.run_directory import RunDirectory
from pipeline.telemetry.clock import PARTS, StepClock, seconds_by_part
from pipeline.telemetry.speed import SpeedMeter, peak_of_device, peak_of_name
from pipeline.telemetry.stragglers import WINDOWS, Stragglers, window_steps
from pipeline.training.start_table import start_table
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
    take_steps(meter, (10.0, 10.5, 0.05))
    assert "perf/mfu" not in meter.figures(1)
    meter.peak = 4e12
    figures = meter.figures(1)
    assert figures["perf/mfu"] == pytest.approx(64 * 5e9 / 0.5 / (2 * 4e12))
    assert figures["perf/seconds_left"] == 4.5 and figures["perf/data_wait_share"] == 0.1


def take_steps(meter: SpeedMeter, *steps: tuple[float, float, float]) -> None:
    """Steps of (when it began, when it ended, how long of it the loader was waited for)."""
    for began, ended, waited in steps:
        meter.begin(began)
        meter.end(waited, [(part, began + 0.1 * number) for number, part in enumerate((*PARTS, ""))], ended)


def test_what_goes_by_between_steps_counts_in_the_speed_and_in_the_time_left():
    plan = {"batches": {"global_batch_size": 30, "world_size": 1}, "training_flops_per_image": 1, "precision": "fp32"}
    meter = SpeedMeter(plan, last_step=104, window=2)
    take_steps(meter, (5.0, 6.0, 0.1), (8.0, 9.0, 0.3), (9.0, 10.0, 0.5))
    figures = meter.figures(3)
    assert figures["perf/step_seconds"] == 1.0
    assert figures["perf/between_steps_seconds"] == 1.0  # two seconds before the first of the last two steps
    assert figures["perf/images_per_second"] == 15.0  # 60 images from 6.0 to 10.0
    assert figures["perf/data_wait_share"] == 0.2
    take_steps(meter, (10.0, 11.0, 0.0))
    figures = meter.figures(4)
    assert figures["perf/images_per_second"] == 30.0
    assert figures["perf/seconds_left"] == 150.0  # by the attempt's half a second between steps, not the window's none


def test_the_parts_of_a_step_add_up_to_it():
    clock, started = StepClock(torch.device("cpu"), lambda part: None), time.perf_counter()
    for part, seconds in (("data", 0.02), ("forward", 0.01), ("data", 0.02), ("update", 0.03)):
        clock.begin(part)
        time.sleep(seconds)
    clock.end()
    whole = time.perf_counter() - started
    time.sleep(0.05)  # what comes after the step is not of it
    parts = seconds_by_part(clock.take())
    assert sum(parts.values()) == pytest.approx(whole, abs=0.005)
    assert parts["data"] >= 0.04 and parts["update"] >= 0.03 and parts["backward"] == 0.0
    assert seconds_by_part(clock.take()) == dict.fromkeys(PARTS, 0.0)


def test_sizes_and_durations_are_told_in_two_units_at_most():
    assert [duration_in_words(seconds) for seconds in (0, 45.4, 200, 3600, 8000, 108000, 59.7, 4e9)] == [
        "0 s", "45 s", "3 min 20 s", "1 h", "2 h 13 min", "1 d 6 h", "1 min", "126 y 274 d",
    ]  # fmt: skip
    assert bytes_in_words(512 * 2**20) == "512.0 MiB" and bytes_in_words(3.25 * 2**30) == "3.25 GiB"


def test_numbers_are_told_in_three_digits_and_without_an_exponent():
    told = [number_in_words(number) for number in (0, 3.15e-05, 0.0123, 0.35, 12.34, 99.96, 1050.4, 2.5e7)]
    assert told == ["0", "less than 0.01", "0.0123", "0.35", "12.3", "100", "1,050", "25,000,000"]


def stragglers_of(*hosts: str) -> Stragglers:
    stragglers = Stragglers(0, 1, torch.device("cpu"))
    stragglers.hosts, stragglers.streaks = [*hosts], [0] * len(hosts)
    return stragglers


def test_a_rank_is_named_when_it_begins_to_hold_up_the_others_and_when_it_ceases_to():
    stragglers = stragglers_of("a", "b", "c", "d")
    slow, even = [0.10, 0.11, 0.30, 0.10], [0.10, 0.11, 0.11, 0.10]
    assert [stragglers.named(slow, 0.4) for _ in range(WINDOWS - 1)] == [[]] * (WINDOWS - 1)
    (line,) = stragglers.named(slow, 0.4)
    assert line.startswith("rank 2 on c holds up the others: 0.3 s of data and forward")
    assert line.endswith("the median rank needs 0.1 s")
    told = [stragglers.named(seconds, 0.4) for seconds in (slow, even, slow, *[even] * (WINDOWS - 1))]
    assert told == [[]] * len(told)
    assert stragglers.named(even, 0.4) == ["rank 2 on c no longer holds up the others"]
    assert stragglers.named(even, 0.4) == []
    assert all(stragglers.named(slow, 10.0) == [] for _ in range(9))  # slow, and too little of a step to matter
    pair = stragglers_of("a", "b")
    lines = [line for _ in range(WINDOWS) for line in pair.named([0.3, 0.1], 0.4)]
    assert len(lines) == 1 and lines[0].endswith("in each step, the other needs 0.1 s")


def test_ranks_are_compared_over_ten_steps_at_least_and_whole_lines_of_the_log():
    assert [window_steps(every) for every in (1, 2, 7, 10, 50)] == [10, 10, 14, 10, 50]


def table_of(*settings: str) -> dict[str, str]:
    """What the start table says of the debug recipe with `settings`, by the word that a line begins with."""
    overrides = parse_overrides(("zero.stage=0", "validation.every_steps=0", "checkpoint.every_steps=10",
                                 "health.images=256", *settings))  # fmt: skip
    raw = read_yaml(recipe_path("pretrain_mae_debug")) | {"epochs": None, "samples": None}
    config = validate(PretrainConfig, apply_overrides(raw, overrides), "test")
    plan = {
        "batches": {"global_batch_size": config.global_batch_size, "world_size": 1, "micro_batch_size": 2,
                    "gradient_accumulation_steps": 8},
        "steps": plan_steps(config, 1000)._asdict(), "data": {"name": "birds"}, "num_classes": 0, "nodes": 1,
        "samples_per_epoch": 1000, "parameters": 1, "training_flops_per_image": 1, "checkpoint_bytes": 2**20,
        "precision": "fp32", "compile_backend": "inductor" if "compile=true" in settings else None,
    }  # fmt: skip
    return {word: words for word, words in (line.split(maxsplit=1) for line in start_table(config, plan))}


def test_the_table_says_what_trains_and_what_is_on():
    plain = table_of()
    assert plain["engine"] == "ddp, fp32" and "budget" not in plain
    assert plain["optimizer"].startswith("adamw, clip off") and plain["rate"].endswith("then cosine to 0")
    assert table_of("health.every_steps=0")["health"] == "off: health.every_steps is 0"
    assert plain["checkpoint"] == "1.0 MiB, every 10 steps" and plain["validation"] == "off"
    assert plain["guard"] == "5 bad steps in a row are gone back over, at most 2 times"
    settings = ["zero.stage=2", "zero.offload_optimizer=cpu", "compile=true", "activation_checkpointing=true"]
    settings += ["deterministic=true"]
    assert table_of(*settings)["engine"] == (
        "ZeRO stage 2, optimizer offloaded to the cpu, fp32, compiled by inductor, activations computed again, "
        "deterministic"
    )
    told = table_of(
        "optimizer.kind=lamb", "optimizer.max_grad_norm=1", "optimizer.schedule=constant", "validation.every_steps=5",
        "budget_gpu_hours=12", "guard.spike_threshold=20",
    )  # fmt: skip
    assert told["optimizer"].startswith("lamb, clip 1.0") and told["rate"].endswith("then constant")
    assert told["checkpoint"] == "1.0 MiB, every 10 steps, and at every validation"
    assert told["budget"] == "12 GPU-hours" and "a leap of the loss by 20 deviations" in told["guard"]
    cooling = table_of("optimizer.schedule=constant", "optimizer.cooldown=3", "optimizer.end_learning_rate=1e-5")
    assert cooling["rate"].endswith("then constant, and over the last 3 steps down to 1e-05")


def train_with_a_slow_rank(run_path: str) -> None:
    from pipeline.training.loop import train
    from pipeline.training.supply import Supply

    me = this_rank(RunDirectory(run_path))
    os.dup2(os.open(me.attempt.log(me.rank), os.O_WRONLY | os.O_CREAT), 1)
    draw = Supply.draw

    def slow_draw(supply, loader):
        time.sleep(0.03)
        return draw(supply, loader)

    if me.rank == 1:
        Supply.draw = slow_draw
    train(me)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_tells_its_table_its_progress_and_which_rank_holds_it_up(stage, tmp_path):
    small_dataset(tmp_path, per_class=25, splits="hash", split_fractions={"train": 0.6, "validation": 0.4})
    run = new_run(
        tmp_path, str(tmp_path / "dataset"), "mae", f"zero.stage={stage}", "steps=30", "log_every_steps=2",
        "validation.every_steps=1", ranks=2,
    )  # fmt: skip
    run_on_ranks(train_with_a_slow_rank, 2, str(run.path))
    told = Path(run.attempt(1).log(0)).read_text()
    for words in ("mae: 0.0", "images      37 of dataset, 16 x 16 pixels", "12 = 2 ranks x 2 images x 3 accumulated",
                  "30 steps = 9.73 epochs = 360 images", "warm-up 2 steps, then cosine", "step 30/30  loss",
                  "saved step-00000030", "validation at step 8: loss", "0 s left"):  # fmt: skip
        assert words in told, words
    assert told.splitlines()[0].partition(" ")[2].startswith("model  ")
    assert told.count("holds up the others") == 1 and "rank 1 on" in told and "the other needs" in told
    assert "MFU" not in told or torch.cuda.is_available()
    lines = ledger_of(run)
    figured = [line for line in lines[2:] if "perf/step_seconds" in line]
    assert lines[-1] in figured and len(figured) >= 5  # as each is scored
    for line in figured:
        parts = sum(line[f"perf/{part}_seconds"] for part in PARTS)
        assert parts == pytest.approx(line["perf/step_seconds"], rel=0.25), json.dumps(line)
        assert line["perf/update_seconds"] > 0 and line["perf/backward_seconds"] > 0
    (best,) = [line for line in lines if line["step"] == json.loads(run.result_file.read_text())["best"]["step"]]
    assert best["validation/loss"] == min(line["validation/loss"] for line in lines)
    assert f"validation at step {best['step']}: loss {best['validation/loss']:.4f} (best so far), 13 images" in told
    passed = lines[-1]["time"] - lines[-21]["time"]
    assert lines[-1]["perf/images_per_second"] == pytest.approx(20 * 12 / passed, rel=0.1)
    assert lines[-1]["perf/between_steps_seconds"] > 0.01
