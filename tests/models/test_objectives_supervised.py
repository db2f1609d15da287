"""Cross-entropy of a softmax and of sigmoids, hard, smoothed and mixed."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.build import build_objective
from models.encoders.config import EncoderConfig
from models.encoders.timm_config import read_encoder
from models.objectives.batch import NO_LABEL
from models.objectives.config import SupervisedConfig
from tests.models.objective_cases import CLASSES, SMALL, batch_of, build, shake


def _target(labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    return (1 - smoothing) * F.one_hot(labels, CLASSES) + smoothing / CLASSES


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True], ids=["hard", "mixed"])
def test_the_loss_is_the_cross_entropy_of_the_whole_target(loss, smoothing, mixed):
    module = shake(build(SupervisedConfig(loss=loss, label_smoothing=smoothing))).eval()
    batch = batch_of(16)
    target = _target(batch.labels, smoothing)
    if mixed:
        weights = torch.rand(16, generator=torch.Generator().manual_seed(3))
        batch = batch._replace(mixed_labels=batch.labels.flip(0), mix_weights=weights)
        target = weights.unsqueeze(1) * target + (1 - weights).unsqueeze(1) * target.flip(0)
    scores = module.encoder(batch.images)
    if loss == "softmax":
        expected = -(target * scores.log_softmax(dim=1)).sum(dim=1)
    else:
        expected = F.binary_cross_entropy_with_logits(scores, target, reduction="none").sum(dim=1)
    outcome = module(batch)
    assert torch.allclose(outcome.losses, expected, rtol=1e-5, atol=1e-5)
    assert outcome.loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_sample_without_a_label_costs_nothing_and_teaches_nothing(loss):
    module, batch = shake(build(SupervisedConfig(loss=loss))), batch_of(4)
    outcome = module(batch._replace(labels=torch.full((4,), NO_LABEL)))
    outcome.loss.backward()
    assert not outcome.losses.any() and not module.encoder.head.weight.grad.any()


def test_the_published_biases_make_the_first_loss_small():
    """10 for the one class that is right, and next to nothing for 21,842 others."""
    module = build(SupervisedConfig(loss="sigmoid", head_bias=-10.0))
    assert module.encoder.head.bias.unique().tolist() == [-10.0]
    first = module(batch_of(8)).loss.item()
    assert first == pytest.approx(10 + CLASSES * math.exp(-10), abs=1e-4)


@pytest.mark.parametrize(
    "encoder",
    [
        EncoderConfig(**SMALL, distillation_token=True),
        read_encoder({"name": "timm:deit_tiny_distilled_patch16_224", "image_size": 16, "arguments": {"depth": 1}}),
        read_encoder({"name": "timm:levit_128s", "image_size": 64, "arguments": {"depth": [1, 1, 1]}}),
    ],
    ids=lambda encoder: encoder.name,
)
def test_a_network_of_two_heads_begins_with_the_bias_on_both(encoder):
    module = build(SupervisedConfig(loss="sigmoid", head_bias=-10.0), encoder)
    first = module(batch_of(2, size=encoder.input_size)).loss.item()
    assert first == pytest.approx(10 + CLASSES * math.exp(-10), abs=1e-4)


def test_a_bias_is_refused_where_the_loss_is_blind_to_it():
    with pytest.raises(ValueError, match="head_bias -10 needs loss: sigmoid"):
        SupervisedConfig(head_bias=-10)


SETS = ((), (0,), (1, 2), (6,), (0, 3, 4, 5), (2,), (1, 3))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True], ids=["hard", "mixed"])
def test_of_several_classes_each_is_a_yes_and_all_others_a_no(smoothing, mixed):
    config = SupervisedConfig(loss="sigmoid", label_smoothing=smoothing)
    encoder = EncoderConfig(**SMALL)
    module = shake(build_objective(config, encoder, num_classes=CLASSES, seed=0, label_sets=SETS)).eval()
    batch = batch_of(16)
    hot = torch.zeros(len(SETS), CLASSES)
    for label, classes in enumerate(SETS):
        hot[label, list(classes)] = 1
    target = (1 - smoothing) * hot + smoothing * hot.sum(dim=1, keepdim=True) / CLASSES
    wanted = target[batch.labels]
    if mixed:
        weights = torch.rand(16, generator=torch.Generator().manual_seed(3))
        batch = batch._replace(mixed_labels=batch.labels.flip(0), mix_weights=weights)
        wanted = weights.unsqueeze(1) * wanted + (1 - weights).unsqueeze(1) * wanted.flip(0)
    scores = module.encoder(batch.images)
    expected = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").sum(dim=1)
    outcome = module(batch)
    torch.testing.assert_close(outcome.losses, expected, rtol=1e-5, atol=1e-5)
    first = scores.argmax(dim=1)
    right = [bool(hot[label, choice]) if SETS[label] else bool((row < 0).all())
             for label, choice, row in zip(batch.labels.tolist(), first.tolist(), scores, strict=True)]  # fmt: skip
    assert outcome.sums["accuracy"] == sum(right)
    unlabelled = module(batch._replace(labels=torch.full((16,), NO_LABEL), mixed_labels=None))
    assert not unlabelled.losses.any() and unlabelled.sums["accuracy"] == 0
