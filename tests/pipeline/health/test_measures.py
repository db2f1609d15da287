"""RankMe, spread and probes on features whose answers are known; explained shares against their definitions."""

import math

import pytest
import torch

from models.inspection.attention_weights import relative_entropy
from models.inspection.explained import explained_share, explained_sums
from pipeline.health.measures import LEAST_RATIO, feature_spread, of_features, of_labels, rankme
from pipeline.preparation.health import IMAGES_PER_DIMENSION


def test_rankme_counts_directions():
    torch.manual_seed(0)
    isotropic = torch.linalg.qr(torch.randn(400, 16))[0]
    assert rankme(isotropic) == pytest.approx(16, rel=1e-3)
    assert rankme(isotropic[:, :4] @ torch.randn(4, 16).sign()) < 4.1
    assert rankme(torch.ones(40, 16)) == pytest.approx(1, abs=1e-3)
    values = torch.linalg.svdvals(sample := torch.randn(300, 12).double() * torch.arange(1, 13))
    shares = values / values.sum() + 1e-7
    assert rankme(sample) == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-9)


def test_spread_is_1_of_all_directions_and_0_of_one_point():
    torch.manual_seed(0)
    assert feature_spread(torch.randn(4000, 24)) == pytest.approx(1, abs=0.01)
    assert feature_spread(torch.ones(40, 24) * torch.rand(40, 1)) == pytest.approx(0, abs=1e-6)


def test_how_many_images_rankme_is_of_is_said_and_fewer_than_four_for_each_dimension_are_not_comparable():
    torch.manual_seed(0)
    rank, _ = of_features(torch.randn(191, 48))
    assert not rank.comparable and rank.note == "of 48 from 191 images, fewer than 4 for each dimension"
    enough = of_features(torch.randn(192, 48))[0]
    assert enough.comparable and enough.note == "of 48 from 192 images" and enough.value > 0.96 * 48
    assert LEAST_RATIO == IMAGES_PER_DIMENSION
    assert all(math.isnan(one.value) for one in of_features(torch.full((9, 3), math.nan)))


def test_probes_learn_from_training_features_alone_and_want_labels_of_two_classes():
    torch.manual_seed(0)
    centres = torch.eye(3).repeat_interleave(40, dim=0) * 5
    features, labels = centres + torch.randn(120, 3), torch.arange(3).repeat_interleave(40)
    order = torch.randperm(120)
    train, held = order[:90], order[90:]
    found = {
        one.metric: one.value for one in of_labels(features[train], labels[train], features[held], labels[held], 3)
    }
    assert found["knn_top1"] > 0.9 and found["ridge_top1"] > 0.9
    unlabelled = torch.full((120,), -1)
    assert of_labels(features, unlabelled, features, labels, 3) == []
    assert of_labels(features, torch.zeros_like(labels), features, labels, 3) == []
    assert of_labels(features, labels, features, unlabelled, 3) == []


def test_the_explained_share_of_numbers_is_0_of_their_mean_and_1_of_themselves():
    torch.manual_seed(0)
    target = torch.randn(6, 5, 8) * 2 + torch.arange(8)
    counted = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
    mean = target[counted].flatten(0, 1).mean(dim=0).expand_as(target)
    for predicted, expected in ((mean, 0.0), (target, 1.0), (mean + 10, None)):
        spoiled = predicted.clone()
        spoiled[3] = 1e6  # of a row that does not count
        share = explained_share(explained_sums(spoiled, target, counted))
        assert share == pytest.approx(expected, abs=1e-6) if expected is not None else share < 0
    halves = [explained_sums(mean[part], target[part], counted[part]) for part in (slice(0, 2), slice(2, 6))]
    together = {name: halves[0][name] + halves[1][name] for name in halves[0]}
    assert explained_share(together) == pytest.approx(0, abs=1e-6)
    constant = torch.ones(4, 5, 8)
    assert math.isnan(explained_share(explained_sums(constant, constant, torch.ones(4, dtype=torch.bool))))


def test_the_explained_share_of_classes_is_that_of_their_entropy():
    target = torch.tensor([[[0, 0], [0, 1]], [[0, 2], [1, 0]]])  # (B, M, cells): 5 of 0, 2 of 1, 1 of 2
    shares = torch.tensor([5, 2, 1]) / 8
    counted = torch.ones(2, dtype=torch.bool)
    frequencies = shares.log().expand(2, 2, 2, 3)
    assert explained_share(explained_sums(frequencies, target, counted)) == pytest.approx(0, abs=1e-6)
    knowing = torch.nn.functional.one_hot(target, 3) * 50.0
    assert explained_share(explained_sums(knowing, target, counted)) == pytest.approx(1, abs=1e-6)
    assert math.isnan(explained_share(explained_sums(knowing, torch.zeros_like(target), counted)))


def test_relative_entropy_is_1_of_even_attention_and_0_of_a_single_token():
    even = torch.full((2, 3, 5, 5), 0.2)
    assert torch.allclose(relative_entropy(even), torch.ones(2))
    assert torch.allclose(relative_entropy(torch.eye(5).expand(2, 3, 5, 5)), torch.zeros(2))
