"""The gate: what is held to what, and that numbers which are none never pass."""

import numpy as np
import pytest

from pipeline.config.export import Bounds, ExportConfig, default_bounds
from pipeline.exporting.parity import answer_of, compared, out_of_bounds, unjudgeable

WIDE = {"max_difference": 9, "max_share_of_spread": 9, "min_agreement": 0.5, "max_accuracy_drop": 0.05}
BOUNDS = Bounds(max_difference=0.1, max_share_of_spread=0.2, min_agreement=0.9, max_accuracy_drop=0.05)
LOGITS = np.eye(10, dtype=np.float32)[np.arange(20) % 10] * 4
LABELS = np.arange(20) % 10


def refused(export, labels=LABELS, bounds=BOUNDS, source=LOGITS, answer="class"):
    finite = export.shape == source.shape and np.isfinite(export).all()
    parity = compared(source, export, labels, answer) if finite else None
    return out_of_bounds(source, export, parity, bounds)


def test_equal_outputs_pass_and_the_largest_difference_is_named():
    parity = compared(LOGITS, LOGITS + 0.2, LABELS, "class")
    assert parity.max_difference == pytest.approx(0.2) and parity.largest == 4 and parity.agreement == 1.0
    assert parity.accuracy == parity.source_accuracy == 1.0
    assert refused(LOGITS) is None and refused(LOGITS + 0.39) is None
    assert "0.41 is 0.102 of the source's largest |output| 4" in refused(LOGITS + 0.41)


def test_another_first_class_and_lost_accuracy_are_refused():
    turned, wide = LOGITS.copy(), Bounds(**WIDE | {"min_agreement": 0.9})
    turned[:3] = np.roll(turned[:3], 1, axis=1)
    assert "agrees with the source on 85.00 %" in refused(turned, bounds=wide)
    lenient = Bounds(**WIDE)
    assert "accuracy 0.8500 against the source's 1.0000" in refused(turned, bounds=lenient)
    assert refused(turned, labels=None, bounds=lenient) is None
    exact = Bounds(**WIDE | {"max_accuracy_drop": 0.15})
    assert refused(turned, bounds=exact) is None


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_none_never_pass(number):
    spoilt = LOGITS.copy()
    spoilt[3, 3] = number
    everything = Bounds(max_difference=10**6, max_share_of_spread=10**6, min_agreement=0, max_accuracy_drop=1)
    assert "not finite" in refused(spoilt, bounds=everything)
    assert "weights are damaged" in unjudgeable(spoilt, "class")
    assert "(20, 9) numbers, the source with (20, 10)" in refused(LOGITS[:, :9], bounds=everything)


def test_a_source_that_says_the_same_of_every_image_is_not_compared():
    assert "the same to every image" in unjudgeable(np.ones((8, 3), np.float32), "class")
    assert "the same to every image" in unjudgeable(np.zeros((8, 3), np.float32), "likeness")
    assert unjudgeable(LOGITS, "class") is None


def test_a_source_that_names_one_class_needs_other_images():
    one_class = (4 * np.eye(10)[3] + np.random.default_rng(0).uniform(-1, 1, (256, 10))).astype(np.float32)
    words = "names one class for each of the 256 images, so agreement would say nothing: train it for longer if it"
    assert words in unjudgeable(one_class, "class")
    assert "names the same classes for each of the 256 images" in unjudgeable(one_class - 2, "classes")
    assert "names the same classes" in unjudgeable(np.linspace(1, 2, 9, dtype=np.float32)[:, None], "classes")
    assert unjudgeable(np.linspace(-1, 2, 9, dtype=np.float32)[:, None], "classes") is None


@pytest.mark.parametrize(("format", "fewer"), [("onnx", False), ("int8", False), ("pt2", True)])
@pytest.mark.parametrize("differ", [2.5e-4, 0.6, 4.0])
def test_an_export_that_ignores_the_image_is_refused(format, fewer, differ):
    """Whatever it says of all images instead, and however little the source's outputs differ beside their size."""
    random = np.random.default_rng(0)
    largest = 10 * np.eye(10)[3]
    source = (largest + random.normal(0, differ, (256, 10))).astype(np.float32)
    middle = (source.max(axis=0) + source.min(axis=0)) / 2
    bounds = Bounds(**default_bounds(format, fewer_tokens=fewer) | {"min_agreement": 0, "max_accuracy_drop": 1})
    for constant in (largest, source.mean(axis=0), middle, source[0]):
        export = np.broadcast_to(constant, source.shape).astype(np.float32)
        assert refused(export, None, bounds, source) is not None
        wide = bounds.model_copy(update={"max_difference": 10})
        assert "outputs differ between images, bounds.max_share_of_spread is" in refused(export, None, wide, source)


def test_a_sigmoid_head_agrees_where_it_says_the_same_classes_of_an_image():
    random = np.random.default_rng(0)
    source = random.normal(-1, 1, (256, 5)).astype(np.float32)
    source[:, 0] = 4 + random.normal(0, 0.1, 256)  # the largest of every image: its place says nothing
    flipped = source.copy()
    flipped[:64, 2] *= -1
    assert compared(source, flipped, None, "class").agreement == 1.0
    parity = compared(source, flipped, None, "classes")
    assert parity.agreement == 0.75
    bounds = Bounds(**WIDE | {"min_agreement": 0.97})
    assert "agrees with the source on 75.00 %" in refused(flipped, None, bounds, source, "classes")


def test_a_single_output_agrees_where_its_sign_does():
    source = np.linspace(-1, 1, 100, dtype=np.float32)[:, None]
    assert compared(source, source + 0.5, None, "classes").agreement == pytest.approx(0.75, abs=0.011)
    assert answer_of(1, "softmax") == answer_of(1, "sigmoid") == answer_of(5, "sigmoid") == "classes"
    assert answer_of(5, "softmax") == "class" and answer_of(0, "softmax") == "likeness"


def test_the_accuracy_of_images_with_several_classes_is_mean_average_precision():
    targets = np.random.default_rng(0).random((200, 4)) < 0.3
    source = np.where(targets, 1.0, -1.0).astype(np.float32)
    spoilt = source.copy()
    spoilt[:, 1] = np.random.default_rng(1).normal(size=200)
    parity = compared(source, spoilt, targets, "classes")
    assert parity.source_accuracy == 1.0 and 0.75 < parity.accuracy < 0.9
    assert "accuracy 0.8" in refused(spoilt, targets, Bounds(**WIDE | {"min_agreement": 0}), source, "classes")


def test_features_agree_where_the_most_alike_image_stays_the_same():
    points = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    assert compared(points, points * 2 + 5, None, "likeness").agreement == 1.0  # its place and scale say nothing
    assert compared(points, points[::-1].copy(), None, "likeness").agreement < 0.5


def test_bounds_are_those_of_the_format_unless_said_otherwise():
    def config(**settings):
        return ExportConfig(**{"model": "m", "destination": "/d", "format": "onnx"} | settings)

    assert config().bounds.max_difference == 1e-4 and config(format="int8").bounds.max_difference == 0.25
    assert config(token_reduction={"keep": 0.5}).bounds.max_difference == 0.5
    assert config(bounds={"min_agreement": 0.5}).bounds == Bounds(
        max_difference=1e-4, max_share_of_spread=0.01, min_agreement=0.5, max_accuracy_drop=0.005
    )
    with pytest.raises(ValueError, match="merges no tokens"):
        config(format="hf", token_reduction={"keep": 0.5})
