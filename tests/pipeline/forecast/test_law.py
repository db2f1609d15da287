"""The law is held to errors that known laws make: intervals hold 80 of 100 outcomes, and widen with the distance."""

import numpy as np
import pytest

from pipeline.forecast.law import TooFew, falls_faster, fit
from tests.pipeline.forecast.laws import CHANCE, FULL, RUNGS, drawn_law, known_law, sigmoid


def drawn(seed, law=known_law, **of_law):
    """Errors of the rungs and of the full run, each 4 % off and measured on 2,000 images."""
    random = np.random.default_rng(seed)
    true = np.array([law(*one, **of_law) for one in [*RUNGS, FULL]])
    runs = true * np.exp(0.04 * random.standard_normal(len(true)))
    counts = random.binomial(2000, np.clip(runs, 0, 1)) / 2000
    return counts[:-1], counts[-1]


def measuring(errors):
    return np.sqrt(np.maximum(errors * (1 - errors), 1e-4) / 2000)


def share_inside(laws, law=known_law, bound=1.0):
    """Of how many of these laws the interval for the full run held what it scored."""
    inside = 0
    for seed, of_law in enumerate(laws):
        errors, outcome = drawn(seed, law, **of_law)
        fitted = fit(errors, RUNGS, measuring(errors), bound=bound)
        middle, low, high = fitted.predict(FULL, float(measuring(np.array(outcome))))
        assert 0 <= low <= middle <= high <= 1
        inside += low <= outcome <= high
    return inside / len(laws)


def test_over_200_laws_an_interval_of_80_percent_holds_70_to_90_of_a_hundred_outcomes():
    random = np.random.default_rng(1)
    assert 0.70 <= share_inside([drawn_law(random) for _ in range(200)]) <= 0.90


@pytest.mark.parametrize(
    ("floor", "exponent", "of_parameters", "first", "least"),
    [
        (0.05, 0.35, 0.1, 0.4, 0.7),
        (0.1, 0.25, 0.05, 0.35, 0.7),
        (0.0, 0.3, 0.1, 0.5, 0.7),  # no floor at all is the edge of what is believed
        (0.1, 0.35, -0.1, 0.4, 0.7),  # a larger network is worse
        (0.01, 0.8, 0.2, 0.5, 0.7),
    ],
)
def test_of_one_law_the_intervals_hold_most_outcomes(floor, exponent, of_parameters, first, least):
    law = {"floor": floor, "exponent": exponent, "of_parameters": of_parameters, "first": first}
    assert share_inside([law] * 60) >= least


@pytest.mark.parametrize("steepness", [0.8, 1.2])
def test_of_curves_that_level_off_at_chance_the_intervals_hold_most_outcomes(steepness):
    """Rungs from 0.28 to 0.69, the full run at 0.81 or 0.88: a power law alone held 2 to 7 of a hundred."""
    assert share_inside([{"middle": 2e5, "steepness": steepness}] * 60, sigmoid, CHANCE) >= 0.65


def test_errors_that_fall_faster_and_faster_are_told_from_power_laws():
    faster = [falls_faster(drawn(seed, sigmoid, middle=2e5, steepness=2.0)[0], RUNGS, [0.01] * 6) for seed in range(40)]
    random = np.random.default_rng(3)
    laws = [falls_faster(drawn(seed, **drawn_law(random))[0], RUNGS, [0.01] * 6) for seed in range(200)]
    assert sum(faster) >= 30 and sum(laws) <= 10
    assert not falls_faster([0.5, 0.4, 0.1, 0.05], [[1e3], [1e3], [2e3], [2e3]], [0.01] * 4)  # two amounts make no bend


def test_what_is_measured_may_be_worse_than_guessing_by_chance():
    hopeless = fit([0.85, 0.88, 0.9, 0.87, 0.9], [[1e3], [2e3], [4e3], [8e3], [9e3]], [0.02] * 5, bound=0.9)
    assert hopeless.predict([1e4], 0.05).high > 0.9 >= hopeless.predict([1e4]).high


def test_a_law_that_is_measured_well_is_recovered():
    law = {"floor": 0.08, "exponent": 0.4, "of_parameters": 0.1, "first": 0.5}
    runs = [(images, parameters) for parameters in (5.5e6, 2.2e7, 4.4e7) for images in np.geomspace(2e4, 8e5, 8)]
    errors = [known_law(*one, **law) for one in runs]
    fitted = fit(errors, runs, [1e-5] * len(runs))
    middle, low, high = fitted.predict(FULL)
    assert middle == pytest.approx(known_law(*FULL, **law), rel=0.03) and high - low < 0.02


def test_intervals_widen_with_the_distance_and_errors_never_grow_with_images():
    errors, _ = drawn(3, floor=0.05, exponent=0.3, of_parameters=0.1, first=0.5)
    fitted = fit(errors, RUNGS, measuring(errors))
    found = [fitted.predict((images, 2.2e7)) for images in (4e5, 1.6e6, 6.4e6, 2.6e7)]
    widths = [np.log(one.high / one.low) for one in found]
    assert widths == sorted(widths) and [one.value for one in found] == sorted(
        (one.value for one in found), reverse=True
    )
    rising = fit([0.3, 0.32, 0.35, 0.4], [[1e5], [2e5], [4e5], [8e5]], [0.01] * 4)  # more images, more errors
    assert rising.predict([8e6]).value <= rising.predict([8e5]).value


def test_accuracy_stays_between_none_and_all():
    hopeless = fit([0.9, 0.9, 0.9, 0.9], [[1e3], [2e3], [4e3], [8e3]], [0.01] * 4, bound=0.9)
    assert 0 <= hopeless.predict([1e9]).low <= hopeless.predict([1e9]).high <= 0.9
    perfect = fit([0.0, 0.0, 0.0, 0.0], [[1e3], [2e3], [4e3], [8e3]], [0.01] * 4)
    assert perfect.predict([1e9]).low >= 0


def test_too_few_runs_make_no_interval():
    with pytest.raises(TooFew, match="3 runs, and a fit needs 4"):
        fit([0.3, 0.2, 0.1], [[1e3], [2e3], [4e3]], [0.01] * 3)
    with pytest.raises(TooFew, match="4 runs, and a fit needs 5"):
        fit([0.3, 0.2, 0.1, 0.1], [[1e3, 1], [2e3, 1], [4e3, 2], [8e3, 2]], [0.01] * 4)
    with pytest.raises(TooFew, match="4 runs"):
        fit([0.3, 0.2, 0.1, 0.1], [[1e3]] * 4, [0.01] * 4)
    of_one_size = fit([0.4, 0.3, 0.2, 0.1], [[1e3, 5e6], [2e3, 5e6], [4e3, 5e6], [8e3, 5e6]], [0.01] * 4)
    with pytest.raises(TooFew, match="same in all runs"):
        of_one_size.predict([1e4, 8e7])
