"""The gate: what is held to what, and that numbers which are none never pass."""

import numpy as np
import pytest

from pipeline.config.export import Bounds, ExportConfig
from pipeline.exporting.parity import compared, out_of_bounds, unjudgeable

BOUNDS = Bounds(max_difference=0.1, min_agreement=0.9, max_accuracy_drop=0.05)
LOGITS = np.eye(10, dtype=np.float32)[np.arange(20) % 10] * 4
LABELS = np.arange(20) % 10


def refused(export, labels=LABELS, bounds=BOUNDS, source=LOGITS, head=True):
    finite = export.shape == source.shape and np.isfinite(export).all()
    parity = compared(source, export, labels, head=head) if finite else None
    return out_of_bounds(source, export, parity, bounds)


def test_equal_outputs_pass_and_the_largest_difference_is_named():
    parity = compared(LOGITS, LOGITS + 0.2, LABELS, head=True)
    assert parity.max_difference == pytest.approx(0.2) and parity.largest == 4 and parity.agreement == 1.0
    assert parity.accuracy == parity.source_accuracy == 1.0
    assert refused(LOGITS) is None and refused(LOGITS + 0.39) is None
    assert "0.41 is 0.102 of the source's largest |output| 4" in refused(LOGITS + 0.41)


def test_another_first_class_and_lost_accuracy_are_refused():
    turned, wide = LOGITS.copy(), Bounds(max_difference=9, min_agreement=0.9, max_accuracy_drop=0.05)
    turned[:3] = np.roll(turned[:3], 1, axis=1)
    assert "agrees with the source on 85.00 %" in refused(turned, bounds=wide)
    lenient = Bounds(max_difference=9, min_agreement=0.5, max_accuracy_drop=0.05)
    assert "accuracy 0.8500 against the source's 1.0000" in refused(turned, bounds=lenient)
    assert refused(turned, labels=None, bounds=lenient) is None
    exact = Bounds(max_difference=9, min_agreement=0.5, max_accuracy_drop=0.15)
    assert refused(turned, bounds=exact) is None


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_none_never_pass(number):
    spoilt = LOGITS.copy()
    spoilt[3, 3] = number
    everything = Bounds(max_difference=10**6, min_agreement=0, max_accuracy_drop=1)
    assert "not finite" in refused(spoilt, bounds=everything)
    assert "weights are damaged" in unjudgeable(spoilt)
    assert "(20, 9) numbers, the source with (20, 10)" in refused(LOGITS[:, :9], bounds=everything)


def test_a_source_that_says_the_same_of_every_image_is_not_compared():
    assert "the same to every image" in unjudgeable(np.ones((8, 3), np.float32))
    assert "the same to every image" in unjudgeable(np.zeros((8, 3), np.float32))
    assert unjudgeable(LOGITS) is None


def test_features_agree_where_the_most_alike_image_stays_the_same():
    points = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    assert compared(points, points * 2 + 5, None, head=False).agreement == 1.0  # its place and scale say nothing
    assert compared(points, points[::-1].copy(), None, head=False).agreement < 0.5


def test_bounds_are_those_of_the_format_unless_said_otherwise():
    def config(**settings):
        return ExportConfig(**{"model": "m", "destination": "/d", "format": "onnx"} | settings)

    assert config().bounds.max_difference == 1e-4 and config(format="int8").bounds.max_difference == 0.25
    assert config(token_reduction={"keep": 0.5}).bounds.max_difference == 0.5
    assert config(bounds={"min_agreement": 0.5}).bounds == Bounds(
        max_difference=1e-4, min_agreement=0.5, max_accuracy_drop=0.005
    )
    with pytest.raises(ValueError, match="merges no tokens"):
        config(format="hf", token_reduction={"keep": 0.5})
