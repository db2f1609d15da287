"""Bands, verdicts and their words; alarms; and what makes a measurement bad."""

import json
import math

import pytest

from pipeline.config.health import HealthConfig
from pipeline.errors import InputError
from pipeline.health.bands import bands_of, read_bands
from pipeline.health.log import FILE, bad_in_a_row, read_verdicts, write_verdicts
from pipeline.health.verdicts import Moment, Value, in_one_line, is_bad, judge
from pipeline.run_directory import RunDirectory

CONFIG = HealthConfig(every_steps=10, images=256)
LATE = Moment(600, 76_800, 12.0, 0.6)


def bands(**metrics):
    return bands_of({"format_version": 1, "basis": "five seeds", "metrics": metrics}, "bands.json")


def test_a_value_inside_its_band_is_told_as_a_person_would():
    verdict = judge(Value("explained_variance", 0.41), LATE, bands(explained_variance=[[0.6, 0.38, 0.45]]), CONFIG)
    assert verdict.words == "epoch 12: explained variance 0.41 (expected 0.38–0.45) ok"
    assert (verdict.verdict, verdict.low, verdict.high, verdict.basis) == ("ok", 0.38, 0.45, "five seeds")
    assert set(verdict.as_line()) == {
        "step", "samples", "epoch", "progress", "metric", "value", "low", "high", "basis", "verdict", "words",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.1, None), (0.2, (0, 1)), (0.3, (1, 2)), (0.4, (2, 3)), (0.9, (2, 3))]
)
def test_bands_lie_on_straight_lines_between_their_points(progress, expected):
    found = bands(rankme=[[0.2, 0, 1], [0.4, 2, 3]]).at("rankme", progress)
    assert found == (expected and pytest.approx(expected))


def test_without_a_band_the_value_is_said_and_that_there_is_no_reference():
    for given in (None, bands(rankme=[[0.9, 1, 2]])):
        verdict = judge(Value("rankme", 31.24, "of 192"), LATE, given, CONFIG)
        assert (verdict.verdict, verdict.low, verdict.high) == ("no band", None, None)
        assert verdict.words == "epoch 12: RankMe 31.2 of 192, no reference"
    few = Value("rankme", 3.0, "of 192 from 90 images, fewer than 4 for each dimension", comparable=False)
    assert judge(few, LATE, bands(rankme=[[0.0, 10, 20]]), CONFIG).verdict == "no band"


@pytest.mark.parametrize(
    ("metric", "value", "kind"),
    [
        ("feature_spread", 0.009, "low"),
        ("rankme", 1.001, "low"),
        ("attention_entropy", 0.01, "low"),
        ("attention_entropy", 0.999999, "high"),
        ("explained_variance", 0.0, "low"),
        ("explained_variance", -0.2, "low"),
        ("knn_top1", math.nan, "low"),
    ],
)
def test_alarms_outrank_bands_and_are_bad(metric, value, kind):
    verdict = judge(Value(metric, value), LATE, bands(**{metric: [[0, -9, 9]]}), CONFIG)
    assert verdict.verdict == kind and verdict.is_bad and verdict.basis.startswith("alarm: ")
    assert kind.upper() in verdict.words
    json.dumps(verdict.as_line(), allow_nan=False)


def test_a_network_that_has_learned_little_alarms_nobody():
    early, short = Moment(5, 80, 0.05, 0.05), Moment(20, 320, 0.2, 1.0)  # of a run of less than an epoch
    for moment, metric, value in (
        (early, "feature_spread", 0.0), (early, "rankme", 1.0), (short, "explained_variance", -0.01),
        (short, "attention_entropy", 1.0),
    ):  # fmt: skip
        assert judge(Value(metric, value), moment, None, CONFIG).verdict == "no band"
    assert judge(Value("rankme", math.nan), early, None, CONFIG).is_bad
    off = HealthConfig(least_spread=0, least_rank=0, least_entropy=0, most_entropy=1, mean_is_bad=False)
    for metric, value in (("feature_spread", 0.0), ("rankme", 1.0), ("attention_entropy", 0.0),
                          ("attention_entropy", 1.0), ("explained_variance", -1.0)):  # fmt: skip
        assert not judge(Value(metric, value), LATE, None, off).is_bad


def test_k_nn_alone_never_makes_a_measurement_bad_and_better_than_expected_is_not_bad():
    given = bands(**{metric: [[0, 0.5, 0.6]] for metric in ("knn_top1", "ridge_top1", "attention_entropy")})

    def verdict(metric, value):
        return judge(Value(metric, value), LATE, given, CONFIG)

    assert verdict("knn_top1", 0.3).verdict == "low" and not is_bad([verdict("knn_top1", 0.3)])
    assert not is_bad([verdict("ridge_top1", 0.9)]) and is_bad([verdict("ridge_top1", 0.3)])
    assert is_bad([verdict("attention_entropy", 0.7)]) and is_bad([verdict("attention_entropy", 0.3)])
    line = in_one_line([verdict("knn_top1", 0.55), verdict("ridge_top1", 0.3)])
    assert line == "epoch 12: 20-NN 0.55 (expected 0.50–0.60) ok; ridge 0.30 (expected 0.50–0.60) low"


def test_the_line_of_a_measurement_says_once_that_nothing_has_a_reference():
    values = [Value("rankme", 31.24, "of 192"), Value("feature_spread", 0.4)]
    verdicts = [judge(value, LATE, None, CONFIG) for value in values]
    assert in_one_line(verdicts) == "epoch 12: RankMe 31.2 of 192; feature spread 0.40 (no reference)"
    assert all(one.words.endswith(", no reference") for one in verdicts)
    one_known = [judge(value, LATE, bands(rankme=[[0, 20, 40]]), CONFIG) for value in values]
    assert in_one_line(one_known) == "epoch 12: RankMe 31.2 of 192 (expected 20.0–40.0) ok; feature spread 0.40"


def spread_at(step: int, spread: float):
    return judge(Value("feature_spread", spread), Moment(step, step, 2.0, 0.8), None, CONFIG)


def test_what_was_measured_behind_a_roll_back_or_a_new_start_counts_no_longer(tmp_path):
    run = RunDirectory(tmp_path)
    attempt = run.attempt(1).make()
    for step, spread in [(2, 0.0), (4, 0.0), (6, 0.0), (4, 0.0)]:  # back to step 2 behind step 6
        write_verdicts(attempt, [spread_at(step, spread)])
    assert [one[0].step for one in read_verdicts(run)] == [2, 4] and bad_in_a_row(read_verdicts(run)) == 2
    write_verdicts(run.attempt(2).make(), [spread_at(3, 0.5)])  # at another cadence, resumed from step 2
    assert [one[0].step for one in read_verdicts(run)] == [2, 3]


@pytest.mark.parametrize("damage", ["nul", "more", "fewer", "version", "nan", "list", "text"])
def test_a_line_that_cannot_be_read_is_passed_over_with_one_warning(tmp_path, caplog, damage):
    run = RunDirectory(tmp_path)
    attempt = run.attempt(1).make()
    write_verdicts(attempt, [spread_at(2, 0.0)])
    told = json.loads((attempt.path / FILE).read_text())
    assert told["format_version"] == 1
    bad = {
        "nul": "\0\0\0", "more": json.dumps(told | {"step": 4, "new": [1]}),
        "fewer": json.dumps({key: told[key] for key in told if key != "progress"}),
        "version": json.dumps(told | {"format_version": 2}), "nan": json.dumps(told | {"value": math.nan}),
        "list": "[1]", "text": json.dumps(told | {"step": "4"}),
    }[damage]  # fmt: skip
    with open(attempt.path / FILE, "a") as file:
        file.write(f"{bad}\n{bad}\n")
    write_verdicts(attempt, [spread_at(6, 0.5)])
    assert [one[0].step for one in read_verdicts(run)] == ([2, 4, 6] if damage == "more" else [2, 6])
    read_verdicts(run)
    assert len(caplog.records) == (damage != "more") and all(
        str(attempt.path / FILE) in r.message for r in caplog.records
    )


def test_a_line_that_a_full_disk_has_cut_takes_no_other_along(tmp_path):
    run = RunDirectory(tmp_path)
    attempt = run.attempt(1).make()
    (attempt.path / FILE).write_text('{"step": 2, "sam')
    write_verdicts(attempt, [spread_at(4, 0.5)])
    assert [one[0].step for one in read_verdicts(run)] == [4]


def test_rows_of_bad_measurements_are_counted_over_attempts_and_the_later_of_a_step_counts(tmp_path):
    run = RunDirectory(tmp_path)
    for number, measured in enumerate([[(2, 0.0), (4, 0.5), (6, 0.0)], [(6, 0.0), (8, 0.0)], [(8, 0.0), (10, 0.0)]], 1):
        for step, spread in measured:
            verdict = judge(Value("feature_spread", spread), Moment(step, step, 2.0, 0.8), None, CONFIG)
            write_verdicts(run.attempt(number).make(), [verdict])
    with open(run.attempt(3).path / FILE, "a") as file:
        file.write('{"step": 12, "sam')  # being written
    found = read_verdicts(run)
    assert [one[0].step for one in found] == [2, 4, 6, 8, 10]
    assert bad_in_a_row(found) == 3 and bad_in_a_row(found[:2]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "metrics: not there"),
        ('{"format_version": 2, "metrics": {}}', "format_version: 2"),
        ('{"format_version": 1, "metrics": {"rankmee": []}}', "did you mean `rankme`"),
        ('{"format_version": 1, "metrics": {"rankme": [[0, 1]]}}', "[0, 1] is not [progress, low, high]"),
        ('{"format_version": 1, "metrics": {"rankme": [[0, 2, 1]]}}', "low not above high"),
        ('{"format_version": 1, "metrics": {"rankme": [[0.5, 1, 2], [0.5, 1, 2]]}}', "in the order of their progress"),
        ("{", "damaged"),
    ],
)
def test_a_bands_file_that_is_none_is_one_line(tmp_path, content, words):
    assert read_bands(tmp_path) is None
    (tmp_path / "bands.json").write_text(content)
    with pytest.raises(InputError) as refused:
        read_bands(tmp_path)
    assert words in str(refused.value) and "bands.json" in str(refused.value)
