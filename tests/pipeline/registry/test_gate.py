"""The champion's gate: same protocol, same data, and better by a paired test or by a stated margin."""

import math

import numpy as np
import pytest

from pipeline.registry.gate import Predictions, Standing, champion_verdict, mcnemar

METRIC = "eval/classify-v1/ants/top1"


def standing(value=None, right=None, of=100, metric=METRIC, data="d", split="validation", labels=None) -> Standing:
    if right is None:
        return Standing(metric, value, data, split)
    correct = np.isin(np.arange(of), list(right)).astype(np.float32)
    labels = np.arange(of) % 5 if labels is None else labels
    return Standing(metric, float(correct.mean()), data, split, Predictions(correct, labels))


@pytest.mark.parametrize(
    ("new", "champion", "promoted", "words"),
    [
        ([standing(0.5)], None, True, "first version"),
        ([standing(0.9)], [standing(0.8)], True, "better by 0.1000"),
        ([standing(0.801)], [standing(0.8)], False, "below the margin"),
        ([standing(0.9, data="e")], [standing(0.8)], False, "other data (e against d)"),
        ([standing(0.9, metric="m")], [standing(0.8)], False, "another protocol (m on validation against eval"),
        ([standing(0.9, metric="eval/classify-v1/bees/top1")], [standing(0.8)], True, "better by 0.1000"),
        ([standing(0.9, metric="eval/classify-v1/ants/map")], [standing(0.8)], False, "another protocol"),
        ([standing(0.9, metric="eval/knn-20-v1/ants/top1")], [standing(0.8)], False, "another protocol"),
        ([standing(0.9, split="test")], [standing(0.8)], False, "top1 on test against eval/classify-v1/ants/top1 on v"),
        ([], [standing(0.8)], False, "this version is a version without an evaluation"),
        ([standing(0.9)], [], False, "the champion is a version without an evaluation"),
        ([standing(right=range(60))], [standing(right=range(50))], True, "10 are right in this version alone, 0 in"),
        ([standing(right=range(55))], [standing(right=range(50))], False, "not better at p < 0.05 by a paired test"),
        ([standing(right=range(50))], [standing(right=range(60))], False, "worse by a paired test"),
        ([standing(right=range(50))], [standing(right=range(50))], False, "p = 1;"),
        ([standing(right=range(99), labels=np.zeros(100))], [standing(right=range(50))], False, "labels of the two"),
        ([standing(right=range(60))], [standing(0.5)], True, "better by 0.1000, margin 0.005"),
    ],
)
def test_the_champion_moves_only_for_the_same_protocol_on_the_same_data(new, champion, promoted, words):
    verdict = champion_verdict(new, champion, margin=0.005)
    assert verdict.promoted is promoted and words in verdict.reason


def test_the_selection_split_decides_wherever_it_can():
    new = [standing(0.9, split="test"), standing(right=range(50))]
    old = [standing(0.1, split="test"), standing(right=range(60))]
    assert not champion_verdict(new, old, margin=0.005).promoted
    verdict = champion_verdict(new[:1], old, margin=0.005)
    assert verdict.promoted and verdict.reason.endswith("as the two were not both scored on a selection split")


def test_a_protocol_that_the_champion_was_not_scored_by_is_passed_over():
    new = [standing(0.9, metric="eval/new-v1/ants/top1"), standing(right=range(60))]
    assert "10 are right" in champion_verdict(new, [standing(right=range(50))], margin=0.005).reason


@pytest.mark.parametrize(("here", "there"), [(0, 0), (1, 0), (5, 0), (6, 0), (9, 1), (10, 10), (3, 17), (120, 80)])
def test_the_exact_test_is_the_binomials_two_tails(here, there):
    n = here + there
    tail = sum(math.comb(n, k) for k in range(max(here, there), n + 1)) / 2**n
    assert mcnemar(here, there) == pytest.approx(min(1.0, 2 * tail))
