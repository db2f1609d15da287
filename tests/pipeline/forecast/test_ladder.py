"""Which ladder speaks of a run, what it says, and the bands that follow from its rungs' curves."""

import json

import numpy as np
import pytest

from pipeline.config.recipe import apply_overrides, parse_overrides, read_yaml, recipe_path, validate
from pipeline.config.training import PretrainConfig
from pipeline.forecast.bands import bands, health_curves
from pipeline.forecast.ladder import Rung, compared, differences, ladders, read_ladder, why_not
from pipeline.forecast.law import TooFew
from pipeline.forecast.outlook import outlook
from pipeline.health.bands import read_bands
from pipeline.run_directory import RunDirectory, write_json
from tests.pipeline.forecast.homes import PLAN, done, ladder

VALUES = (0.52, 0.6, 0.67, 0.58, 0.66, 0.72)


def config(*settings: str) -> PretrainConfig:
    raw = read_yaml(recipe_path("pretrain_supervised_debug"))
    return validate(PretrainConfig, apply_overrides(raw, parse_overrides(settings)), "--set")


def said(home, *settings: str, plan=PLAN, name="runs/x"):
    return outlook(config(*settings), plan, home, {"kind": "local"}, home / name)


def test_a_ladder_forecasts_the_run_of_its_recipe_and_says_on_what_it_is_based(tmp_path):
    made = ladder(tmp_path, compared(config()), VALUES)
    assert read_ladder(made.directory) == made
    found = said(tmp_path)
    entry = found.forecasts["accuracy"]
    assert VALUES[-1] - 0.05 < entry["low"] < entry["value"] < entry["high"] < 1
    assert entry["metric"] == "validation/accuracy" and entry["unit"] == "share"
    assert found.basis == ["6 rungs of ladder digits-1 (accuracy)"] and not found.notes
    assert "hours" not in found.forecasts
    assert found.in_words[0].startswith("forecast: accuracy 0.")
    assert said(tmp_path, name="ladders/digits-1/own-0.1").forecasts == {}  # a rung is not told what it will score


def test_size_length_in_epochs_alone_seed_and_speed_may_differ(tmp_path):
    ladder(tmp_path, compared(config()), VALUES)
    free = ["encoder.depth=3", "seed=4", "micro_batch_size=4", "zero.stage=2", "checkpoint.every_steps=3"]
    assert "accuracy" in said(tmp_path, *free).forecasts


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate is"),
        ("augmentation.flip=false", "augmentation.flip is True there and False here"),
        ("objective.label_smoothing=0.3", "objective.label_smoothing is"),
        ("encoder.patch_size=4", "encoder.patch_size is 8 there and 4 here"),
        ("global_batch_size=32", "global_batch_size is 16 there and 32 here"),
    ],
)
def test_a_ladder_of_other_settings_is_not_used_and_the_first_is_named(tmp_path, setting, words):
    ladder(tmp_path, compared(config()), VALUES)
    found = said(tmp_path, setting)
    assert not found.forecasts and len(found.notes) == 1
    assert found.notes[0].startswith("ladder digits-1 is not used: ") and words in found.notes[0]


def test_a_ladder_of_other_data_or_another_length_is_not_used(tmp_path):
    ladder(tmp_path, compared(config()), VALUES, fingerprint="a" * 64)
    found = said(tmp_path)
    assert found.notes == ["ladder digits-1 is not used: it is of other data (birds, fingerprint aaaaaaaaaaaa)"]
    longer = PLAN | {"steps": {"steps": 200, "samples": 20_000}, "data": {"name": "birds", "fingerprint": "a" * 64}}
    assert said(tmp_path, plan=longer).notes == [
        "ladder digits-1 is not used: its rungs see each image 10 times and this run 20 times"
    ]
    ladder(tmp_path, compared(config()), VALUES, name="digits-2")  # and one that does speak of it
    assert said(tmp_path).basis == ["6 rungs of ladder digits-2 (accuracy)"] and not said(tmp_path).notes


def test_a_rung_that_failed_is_missing_and_said_so(tmp_path):
    ladder(tmp_path, compared(config()), (*VALUES[:5], None))
    assert said(tmp_path).basis == ["5 rungs of ladder digits-1 without rung-5 (accuracy)"]
    made = ladder(tmp_path, compared(config()), (*VALUES[:4], None, None), name="digits-2")
    found = said(tmp_path)
    assert not found.forecasts and found.notes == [
        "ladder digits-2 without rung-4, rung-5: no forecast: 4 runs, and a fit needs 5 that differ"
    ]
    with pytest.raises(TooFew):
        made.forecast(10_000, 8000)


def test_a_ladder_that_cannot_be_read_is_none(tmp_path):
    made = ladder(tmp_path, compared(config()), VALUES)
    file = made.directory / "ladder.json"
    whole = file.read_text()
    for text in (whole[: len(whole) // 2], "[]", "{}", whole.replace('"format_version": 1', '"format_version": 9')):
        file.write_text(text)
        assert list(ladders(tmp_path)) == [] and not said(tmp_path).forecasts


def test_time_and_price_are_forecast_from_past_runs(tmp_path):
    for number in range(4):
        done(tmp_path / "runs", f"run-{number}", seconds=6.0 + number / 10)
    profile = {"kind": "local", "price_per_device_hour": 2.0}
    found = outlook(config(), PLAN, tmp_path, profile, tmp_path / "runs" / "x")
    hours, price = found.forecasts["hours"], found.forecasts["cost"]
    assert hours["low"] < 18 / 3600 < hours["high"] and price["value"] == pytest.approx(2 * hours["value"])
    assert found.basis == ["4 past runs of this profile (time)"]
    run = RunDirectory(tmp_path / "runs" / "x")
    run.path.mkdir()
    found.write(run)
    written = json.loads((run.path / "forecast.json").read_text())
    assert written["format_version"] == 1 and set(written["forecasts"]) == {"hours", "cost"}
    assert not (run.path / "bands.json").exists() and written["steps"] == 100 and written["world_size"] == 2
    rehearsal = outlook(config(), PLAN | {"rehearsal": True}, tmp_path, profile, tmp_path / "runs" / "y")
    assert rehearsal.forecasts == {} and rehearsal.notes == []


def test_bands_of_others_stay_and_those_of_a_ladder_that_is_gone_do_not(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "x")
    run.path.mkdir(parents=True)
    for basis, stays in (("5 seeds of pretrain_mae_digits", True), ("6 rungs of ladder digits-1", False)):
        write_json(run.path / "bands.json", {"format_version": 1, "basis": basis, "metrics": {}})
        said(tmp_path).write(run)
        assert (run.path / "bands.json").exists() is stays


def rung(number, samples, parameters, curves) -> Rung:
    return Rung(f"r{number}", "", samples, parameters, value=0.5, count=100, curves=curves)


def explained(progress, samples, parameters):
    return 0.6 * progress**0.5 + 0.03 * np.log(samples / 1000) + 0.01 * np.log(parameters / 1000)


def test_a_band_holds_the_curve_of_the_run_that_it_is_for():
    points, inside, whole = np.linspace(0.05, 1, 20), 0, 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        rungs = [
            rung(n, *shape, {"explained_variance": [[p, explained(p, *shape) + 0.01 * random.standard_normal()]
                                                    for p in points]})
            for n, shape in enumerate([(s, k) for k in (1000, 4000) for s in (1000, 2000, 4000)])
        ]  # fmt: skip
        for progress, low, high in bands(rungs, 10_000, 16_000)["explained_variance"]:
            inside += low <= explained(progress, 10_000, 16_000) + 0.01 * random.standard_normal() <= high
            whole += 1
            assert low < high <= 1
    assert inside / whole >= 0.9 and whole == 20 * 20


def test_of_too_few_curves_there_is_no_band():
    curve = {"explained_variance": [[0.5, 0.2], [1.0, 0.3]], "rankme": [[1.0, 3.0]]}
    assert bands([rung(n, 1000 * (n + 1), 1000, curve) for n in range(3)], 10_000, 1000) == {}
    assert set(bands([rung(n, 1000 * (n + 1), 1000, curve) for n in range(4)], 10_000, 1000)) == {"explained_variance"}


def test_curves_come_from_every_attempt_and_a_cut_line_is_left_out(tmp_path):
    run = done(tmp_path, "one", seconds=5.0)
    line = {
        "step": 10,
        "samples": 100,
        "epoch": 1,
        "progress": 0.5,
        "metric": "rankme",
        "value": 7.0,
        "verdict": "no band",
    }
    (run.attempt(1).path / "health.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps(line | {"step": 15, "progress": 0.75}) + "\n"
    )
    run.attempt(2).make()
    later = [line | {"step": 15 + 5 * k, "progress": 0.75 + 0.25 * k, "value": 8.0 + k} for k in (0, 1)]
    (run.attempt(2).path / "health.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in later) + '{"step": 2')
    assert health_curves(run) == {"rankme": [[0.5, 7.0], [0.75, 8.0], [1.0, 9.0]]}
    assert health_curves(done(tmp_path, "two", seconds=5.0)) == {}


def test_differences_name_keys_and_both_values():
    assert list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})) == ["a.b is 3 there and 1 here"]
    made = config()
    assert why_not.__doc__ and list(differences(compared(made), compared(made))) == []


def test_bands_of_a_ladder_are_what_the_trainer_reads(tmp_path):
    shapes = [(samples, parameters) for parameters in (1000, 4000) for samples in (1000, 2000, 4000)]
    curves = [
        {"explained_variance": [[p, explained(p, *shape)] for p in (0.1, 0.4, 0.7, 1.0)],
         "rankme": [[p, 20 * p + shape[1] / 1000] for p in (0.1, 0.4, 0.7, 1.0)],
         "knn_top1": [[p, 0.9 + p / 10] for p in (0.1, 0.4, 0.7, 1.0)]}
        for shape in shapes
    ]  # fmt: skip
    ladder(tmp_path, compared(config()), VALUES, curves=curves)
    run = RunDirectory(tmp_path / "runs" / "x")
    run.path.mkdir(parents=True)
    said(tmp_path).write(run)
    found = read_bands(run.path)
    assert found.basis == "6 rungs of ladder digits-1" and set(found.metrics) == set(curves[0])
    assert found.at("explained_variance", 0.05) is None  # before the first that every rung has measured
    low, high = found.at("rankme", 1.0)
    assert 1 < low < high and found.at("knn_top1", 1.0)[1] <= 1.0
