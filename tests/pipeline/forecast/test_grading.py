"""Forecasts are held against what came, once, and only against what they were of."""

import json

import pytest

from pipeline.forecast.grading import (
    forecast_lines,
    forecast_of,
    grade_at_end,
    grade_evaluated,
    graded_in_words,
    kept_words,
)
from pipeline.forecast.past import past_runs
from pipeline.run_directory import RunDirectory, write_json
from tests.pipeline.forecast.homes import done

LINEAR = "eval/linear-cached-v1/digits.validation/top1"


def forecast(run, **entries):
    write_json(run.path / "forecast.json", {
        "format_version": 1, "basis": "6 rungs of ladder x", "data_fingerprint": "f" * 64, "steps": 100,
        "world_size": 2, "forecasts": entries,
    })  # fmt: skip


def entry(low, high, **more):
    return {"value": (low + high) / 2, "low": low, "high": high} | more


def test_time_price_and_a_supervised_accuracy_are_graded_at_the_end(tmp_path):
    run = done(tmp_path, "run", seconds=3588.0)  # an hour with what is around
    forecast(run, accuracy=entry(0.7, 0.8, metric="validation/accuracy"), hours=entry(1.5, 2.0),
             cost=entry(3.0, 5.0, per_hour=4.0))  # fmt: skip
    result = {"best": {"metric": "validation/accuracy", "value": 0.79}, "metrics": {"validation/accuracy": 0.75}}
    found = grade_at_end(run, result)
    assert found["accuracy"] == {"value": 0.75, "low": 0.7, "high": 0.8, "outcome": 0.79, "inside": True}
    assert found["hours"]["outcome"] == pytest.approx(1.0) and found["hours"]["inside"] is False
    assert found["cost"]["outcome"] == pytest.approx(4.0) and found["cost"]["inside"] is True
    assert graded_in_words(found) == (
        "forecast: accuracy 0.750 (0.700–0.800), outcome 0.790, inside; time 1 h 45 min (1 h 30 min–2 h), took 1 h, "
        "outside; cost 4.00 (3.00–5.00), outcome 4.00, inside"
    )
    assert list(forecast_lines(run))[0].endswith(": 80 % intervals by 6 rungs of ladder x")


def test_a_run_without_a_forecast_or_with_a_damaged_one_ends_as_any_other(tmp_path, caplog):
    run = done(tmp_path, "run", seconds=10.0)
    assert grade_at_end(run, {"metrics": {}}) == {} and not caplog.records and list(forecast_lines(run)) == []
    (run.path / "forecast.json").write_text("{")
    assert grade_at_end(run, {"metrics": {}}) == {} and "forecast.json: not graded" in caplog.text
    forecast(run, accuracy=entry(0.7, 0.8, metric=LINEAR))
    assert grade_at_end(run, {"metrics": {}}) == {}  # not known before it is evaluated


def evaluation(folder, run, *, step=100, split="validation", fingerprint="f" * 64, value=0.78) -> RunDirectory:
    found = RunDirectory(folder)
    found.path.mkdir()
    write_json(found.plan_file, {"sources": {"mine": {"lineage": {"run": str(run.path), "step": step}}}})
    write_json(found.result_file, {
        "stage": "evaluate", "metrics": {"mine": {"eval/linear-cached-v1/renamed.validation/top1": value}},
        "datasets": {"renamed.validation": {"split": split, "fingerprint": fingerprint}},
    })  # fmt: skip
    return found


def test_a_model_without_labels_is_graded_by_the_evaluation_that_its_forecast_is_of(tmp_path):
    run = done(tmp_path, "run", seconds=10.0)
    forecast(run, accuracy=entry(0.7, 0.8, metric=LINEAR), hours=entry(0.0, 1.0))
    for name, other in (("best", {"step": 50}), ("test", {"split": "test"}), ("data", {"fingerprint": "0" * 64})):
        assert list(grade_evaluated(evaluation(tmp_path / name, run, **other))) == []
    assert "forecast" not in json.loads(run.result_file.read_text())
    assert list(grade_evaluated(evaluation(tmp_path / "right", run))) == [
        "run: forecast: accuracy 0.750 (0.700–0.800), outcome 0.780, inside"
    ]
    assert json.loads(run.result_file.read_text())["forecast"]["accuracy"]["outcome"] == 0.78
    assert list(grade_evaluated(evaluation(tmp_path / "again", run, value=0.2))) == []  # the first one counts
    assert json.loads(run.result_file.read_text())["forecast"]["accuracy"]["outcome"] == 0.78


def test_a_run_that_was_made_longer_is_not_graded_by_an_evaluation_of_where_it_stood(tmp_path, caplog):
    run = done(tmp_path, "run", seconds=10.0, steps={"steps": 200, "samples": 20_000})
    forecast(run, accuracy=entry(0.7, 0.8, metric=LINEAR))
    for step in (100, 200):
        assert list(grade_evaluated(evaluation(tmp_path / str(step), run, step=step))) == []
    assert "forecast" not in json.loads(run.result_file.read_text()) and "steps is another" in caplog.text


@pytest.mark.parametrize(
    "damaged",
    [
        *({"value": 0.7, "high": 0.8}, 0.7, None, [], {"value": 0.7, "low": "0.7", "high": 0.8}),
        *({"value": 0.7, "low": 0.7, "high": float("nan")}, entry(0.7, 0.8, metric=["validation/accuracy"])),
    ],
)
def test_of_a_damaged_forecast_what_is_whole_is_graded_and_the_rest_is_told(tmp_path, caplog, damaged):
    run = done(tmp_path, "run", seconds=3588.0)
    forecast(run, accuracy=damaged, hours=entry(0.5, 2.0))
    assert set(grade_at_end(run, {"metrics": {}})) == {"hours"}
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{run.path / 'forecast.json'}: accuracy is not graded: ") and "low and high" in told
    forecast(run, accuracy=damaged)
    assert grade_at_end(run, {"metrics": {}}) == {} and list(forecast_lines(run)) == []


@pytest.mark.parametrize("text", ["[1]", "7", '{"forecasts": []}', '{"forecasts": null}', "{}"])
def test_a_file_that_is_no_forecast_is_told_and_breaks_nothing(tmp_path, caplog, text):
    run = done(tmp_path, "run", seconds=10.0)
    (run.path / "forecast.json").write_text(text)
    assert grade_at_end(run, {"metrics": {}}) == {} and "forecast.json: not graded" in caplog.text


def test_how_often_forecasts_were_kept_is_counted_over_a_home(tmp_path):
    assert kept_words(past_runs(tmp_path)) is None
    for number, inside in enumerate((True, True, False)):
        graded = {"hours": {"inside": inside}} | ({"accuracy": {"inside": True}} if number == 2 else {})
        done(tmp_path / "runs", f"run-{number}", seconds=10.0, forecast=graded)
    done(tmp_path / "runs", "none", seconds=10.0)
    assert sorted(kept_words(past_runs(tmp_path)).split(", ")) == ["accuracy 1 of 1", "time 2 of 3"]


def test_a_forecast_is_read_as_it_was_written(tmp_path):
    run = done(tmp_path, "run", seconds=10.0)
    forecast(run, hours=entry(1, 2))
    assert forecast_of(run)["forecasts"]["hours"]["high"] == 2


def test_a_run_that_was_made_longer_or_put_on_other_ranks_is_not_graded(tmp_path, caplog):
    for key, changed in (("steps", {"steps": 200, "samples": 20_000}), ("world_size", 4)):
        run = done(tmp_path, key, seconds=10.0, **{key: changed})
        forecast(run, hours=entry(0, 2))
        assert grade_at_end(run, {"metrics": {}}) == {} and f"not graded: {key} is another" in caplog.text
