"""What past runs of a home say of the time of another."""

import os
import time

import numpy as np
import pytest

from pipeline.forecast.pace import START_SECONDS, Pace, expectation, learned_pace, planned_seconds
from pipeline.forecast.past import past_runs, place_of, seconds_taken
from tests.pipeline.forecast.homes import PLAN, done

HERE = place_of(PLAN, {"kind": "local"})


def test_a_run_took_what_its_heartbeats_say_and_its_training_what_its_ledger_says(tmp_path):
    run = done(tmp_path, "one", seconds=80.0, around=12.0)
    taken = seconds_taken(run)
    assert (
        taken.whole == pytest.approx(92.0)
        and taken.training == pytest.approx(80.0)
        and taken.around == pytest.approx(12)
    )
    run.attempt(2).make()  # killed before it said anything
    assert seconds_taken(run) == taken
    assert seconds_taken(done(tmp_path, "none", seconds=0.0)) is None


def test_hours_are_learned_from_runs_of_the_same_place_alone(tmp_path):
    planned = planned_seconds(PLAN)
    assert planned == pytest.approx(10_000 * 1e8 / 2e11)
    for number, ratio in enumerate((1.1, 1.2, 1.3, 1.2, 1.15)):
        done(tmp_path / "runs", f"run-{number}", seconds=ratio * planned)
    done(tmp_path / "runs", "cluster", seconds=100 * planned, kind="slurm")
    done(tmp_path / "runs", "more-ranks", seconds=50 * planned, world_size=4)
    done(tmp_path / "runs", "rehearsal", seconds=70 * planned, rehearsal=True)
    damaged = done(tmp_path / "runs", "damaged", seconds=planned)
    damaged.plan_file.write_text("{")
    runs = past_runs(tmp_path)
    assert {past.run.path.name for past in runs} == {*(f"run-{n}" for n in range(5)), "cluster", "more-ranks"}
    pace = learned_pace(runs, HERE)
    assert pace.in_words.startswith("past runs here took ") and "5 runs of this profile, and 12 s to" in pace.in_words
    hours = pace.hours(PLAN)
    assert hours.value == pytest.approx((1.2 * planned + 12) / 3600, rel=0.05) and hours.low < hours.value < hours.high
    longer = PLAN | {"steps": {"steps": 10_000, "samples": 1_000_000}}  # start-up weighs less
    assert pace.hours(longer).value == pytest.approx(1.2 * 100 * planned / 3600, rel=0.05)
    larger = PLAN | {"training_flops_per_image": 1e11}
    spread, wider = (np.log(one.high / one.low) for one in (pace.hours(longer), pace.hours(larger)))
    assert wider > 1.5 * spread  # a thousand times the arithmetic of what was ever measured
    assert learned_pace(runs, place_of(PLAN, {"kind": "kubernetes"})) is None


@pytest.mark.parametrize(
    ("kind", "key", "one", "other"),
    [
        ("slurm", "partition", "a100", "h100"),
        ("slurm", "constraint", "a100", "h100&ib"),
        ("slurm", "gres", "gpu:a100:8", "gpu:h100:8"),
        ("slurm", "directives", ["--gpus=a100:8"], ["--gpus=h100:8"]),
        ("kubernetes", "node_selector", {"gpu": "a100"}, {"gpu": "h100"}),
        ("kubernetes", "accelerator_resource", "nvidia.com/gpu", "amd.com/gpu"),
    ],
)
def test_other_machines_of_the_same_cluster_are_another_place(tmp_path, kind, key, one, other):
    for number in range(3):
        done(
            tmp_path / "runs", f"slow-{number}", seconds=60.0, kind=kind, profile={key: one, "price_per_device_hour": 2}
        )
        done(tmp_path / "runs", f"fast-{number}", seconds=6.0, kind=kind, profile={key: other, "time": "1:00:00"})
    runs = past_runs(tmp_path)
    slow, fast = (learned_pace(runs, place_of(PLAN, {"kind": kind, key: value})) for value in (one, other))
    assert len(slow.ratios) == len(fast.ratios) == 3 and slow.ratios.min() > 5 * fast.ratios.max()


def test_two_runs_say_their_ratio_and_make_no_interval(tmp_path):
    for number in range(2):
        done(tmp_path / "runs", f"run-{number}", seconds=6.0)
    pace = learned_pace(past_runs(tmp_path), HERE)
    assert pace.in_words == (
        "past runs here took 1.20 (1.20–1.20) times their plan: 2 runs of this profile, and 12 s to start and end"
    )
    assert pace.hours(PLAN) is None


def test_intervals_of_time_hold_80_of_a_hundred_runs():
    inside, random = 0, np.random.default_rng(0)
    for _ in range(200):
        logs = np.log(1e10) + random.uniform(0, 3, 6)
        slope = -random.uniform(0, 0.2)
        log_ratios = 0.3 + slope * (logs - logs[0]) + 0.08 * random.standard_normal(6)
        plan = PLAN | {"training_flops_per_image": 2e9}
        target = np.log(100 * 2e9 / 2)
        outcome = planned_seconds(plan) * np.exp(0.3 + slope * (target - logs[0]) + 0.08 * random.standard_normal())
        hours = Pace(np.exp(log_ratios), logs, 0.0).hours(plan)
        inside += hours.low <= outcome / 3600 <= hours.high
    assert 0.70 <= inside / 200 <= 0.90


def test_runs_of_much_smaller_steps_forecast_nothing():
    pace = Pace(np.array([50.0, 60.0, 110.0]), np.log([1e7, 2e7, 3e7]), 30.0)
    small, large = (PLAN | {"training_flops_per_image": flops} for flops in (1e6, 1e12))
    assert pace.hours(small) is not None and pace.hours(large) is None


def test_several_runs_are_expected_by_one_measure(tmp_path):
    for number in range(3):
        done(tmp_path / "runs", f"run-{number}", seconds=60.0)
    runs, huge = past_runs(tmp_path), PLAN | {"training_flops_per_image": 1e13}
    learned, stated, none = (
        expectation(of, HERE, plans) for of, plans in ((runs, [PLAN]), (runs, [PLAN, huge]), ([], [PLAN]))
    )
    assert learned.hours(PLAN) == pytest.approx((60.0 + 12.0) / 3600, rel=0.1)
    assert learned.in_words.startswith("past runs here took ")
    for arithmetic in (stated, none):  # it says nothing of one of them, so it is asked of none
        assert arithmetic.hours(PLAN) == pytest.approx((planned_seconds(PLAN) + START_SECONDS) / 3600)
    assert stated.in_words.endswith("3 past runs here, too unlike these to learn from")
    assert none.in_words.endswith("no past runs to learn from")


def test_a_home_of_ten_thousand_runs_is_learned_from_in_a_second(tmp_path):
    for number in range(10_000):
        (tmp_path / "runs" / f"old-{number:05d}").mkdir(parents=True)
    old = time.time() - 1e6
    for entry in os.scandir(tmp_path / "runs"):
        os.utime(entry.path, (old, old))
    for number in range(40):
        done(tmp_path / "runs", f"new-{number:03d}", seconds=6.0)
    started = time.process_time()
    assert len(past_runs(tmp_path)) == 40 and time.process_time() - started < 2.0
    started = time.process_time()
    past_runs(tmp_path)  # what was read once is read no more
    assert time.process_time() - started < 0.5
