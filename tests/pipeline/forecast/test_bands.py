"""Bands of health hold sound runs, whatever law their metrics follow, and still tell a collapse."""

import numpy as np
import pytest

from pipeline.config.health import HealthConfig
from pipeline.forecast.bands import as_file, bands
from pipeline.forecast.ladder import Rung
from pipeline.health.bands import bands_of
from pipeline.health.verdicts import Moment, Value, judge
from tests.pipeline.forecast.laws import FULL, RUNGS, drawn_law, known_law

WORLDS = 40


def rung(number, shape, curves) -> Rung:
    return Rung(f"r{number}", "", *map(int, shape), value=0.5, count=400, curves=curves)


def accuracy(random):
    """Of 400 images: 1 less a saturating power law, runs alike but for their seed 4 % of their error apart."""
    law = drawn_law(random)
    errors = np.array([known_law(*shape, **law) for shape in [*RUNGS, FULL]])
    return 1 - random.binomial(400, np.clip(errors * np.exp(0.04 * random.standard_normal(7)), 0, 1)) / 400


def explained(random):
    """Saturates at 0.5 to 0.8 of the variance."""
    law = drawn_law(random) | {"floor": random.uniform(0.2, 0.5), "first": random.uniform(0.1, 0.4)}
    return 1 - np.array([known_law(*shape, **law) for shape in [*RUNGS, FULL]]) + 0.01 * random.standard_normal(7)


def share(random):
    """Grows towards a top below 1."""
    law = drawn_law(random) | {"floor": 0.0, "first": random.uniform(0.1, 0.7)}
    lacking = np.array([known_law(*shape, **law) for shape in [*RUNGS, FULL]])
    return random.uniform(0.4, 0.95) * (1 - lacking) + 0.01 * random.standard_normal(7)


def rank(random):
    """Grows with the width, and with images towards a top."""
    law = drawn_law(random) | {"floor": 0.0, "first": random.uniform(0.2, 0.8)}
    lacking = np.array([known_law(*shape, **law) for shape in [*RUNGS, FULL]])
    widths = np.array([(shape[1] / 5.5e6) ** 0.3 for shape in [*RUNGS, FULL]])
    return random.uniform(50, 400) * widths * (1 - lacking) * np.exp(0.05 * random.standard_normal(7))


def last_band(metric, values):
    """At the end of the run, by rungs that ended with these values."""
    rungs = [rung(n, shape, {metric: [[0.95, value], [1.0, value]]})
             for n, (shape, value) in enumerate(zip(RUNGS, values, strict=True))]  # fmt: skip
    _, low, high = bands(rungs, *map(int, FULL))[metric][-1]
    return low, high


@pytest.mark.parametrize(
    ("metric", "world", "widest"),
    [("ridge_top1", accuracy, 0.3), ("explained_variance", explained, 0.2), ("feature_spread", share, 0.35),
     ("attention_entropy", share, 0.35), ("rankme", rank, np.inf)],
)  # fmt: skip
def test_a_band_of_95_percent_holds_at_least_90_of_a_hundred_sound_runs(metric, world, widest):
    inside, widths = 0, []
    for seed in range(WORLDS):
        *values, outcome = world(np.random.default_rng(seed))
        low, high = last_band(metric, values)
        inside += low <= outcome <= high
        widths.append(high - low)
    assert inside / WORLDS >= 0.9 and np.median(widths) < widest


def test_a_run_as_good_as_may_be_or_as_its_largest_rungs_is_in_good_health_and_a_collapse_is_not():
    """Rungs of quickstart's digits."""
    scores, shapes = [0.571, 0.845, 0.950, 0.745, 0.914, 0.978], [(s, p) for p in (113, 450) for s in (1, 2, 4)]
    rungs = [rung(n, (10_780 * samples, 1000 * parameters), {
                 "ridge_top1": [[0.1, 0.4 * score], [0.5, 0.9 * score], [1.0, score]],
                 "feature_spread": [[0.1, 0.2], [1.0, 0.5 + 0.05 * n]]})
             for n, ((samples, parameters), score) in enumerate(zip(shapes, scores, strict=True))]  # fmt: skip
    found = bands_of(as_file(bands(rungs, 107_800, 450_000), "6 rungs"), "bands.json")
    values = [("ridge_top1", 0.978), ("ridge_top1", 0.992), ("ridge_top1", 1.0), ("feature_spread", 0.76)]
    for metric, value, is_bad in [*((*one, False) for one in values), ("ridge_top1", 0.7, True),
                                  ("feature_spread", 0.4, True)]:  # fmt: skip
        said = judge(Value(metric, value), Moment(1000, 10_000, 10, 1.0), found, HealthConfig())
        assert said.is_bad is is_bad and said.low < said.high, said.words


def test_a_band_follows_the_curve_and_stays_within_what_a_metric_can_be():
    points, inside, whole = np.linspace(0.05, 1, 20), 0, 0
    for seed in range(8):
        random = np.random.default_rng(seed)
        *ends, outcome = explained(random)
        rungs = [rung(n, shape, {"explained_variance": [[p, end * p**0.5 + 0.01 * random.standard_normal()]
                                                        for p in points]})
                 for n, (shape, end) in enumerate(zip(RUNGS, ends, strict=True))]  # fmt: skip
        found = bands(rungs, *map(int, FULL))["explained_variance"]
        assert [progress for progress, _, _ in found] == pytest.approx(np.linspace(0.1, 1, 10))
        for progress, low, high in found:
            inside += low <= outcome * progress**0.5 <= high
            whole += 1
            assert low < high <= 1
    assert inside / whole >= 0.9
    for value in (0.0, 1.0):
        low, high = last_band("knn_top1", [value] * 6)
        assert 0 <= low < high <= 1
        low, high = last_band("attention_entropy", [value] * 6)
        assert 0 <= low < high <= 1


def test_of_too_few_curves_and_of_a_size_that_no_rung_varies_there_is_no_band():
    curve = {"explained_variance": [[0.5, 0.2], [1.0, 0.3]], "rankme": [[0.5, 3.0], [1.0, 4.0]], "knn_top1": [[1.0, 1]]}
    four = [rung(n, (1000 * (n + 1), 1000), curve) for n in range(4)]
    assert bands(four[:3], 10_000, 1000) == bands(four, 10_000, 2000) == bands([], 10_000, 1000) == {}
    assert set(bands(four, 10_000, 1000)) == {"explained_variance", "rankme"}
