"""Scores, intervals and probes: each held to what can be counted by hand or to another library."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score

from pipeline.errors import InputError
from pipeline.evaluation.calibration import calibration_scores, expected_calibration_error, fitted_temperature
from pipeline.evaluation.differences import differences_from_first
from pipeline.evaluation.frozen.few_shot import STRENGTH, drawn_shots, few_shot_scores, least_squares
from pipeline.evaluation.frozen.linear import held_back, linear_scores
from pipeline.evaluation.frozen.retrieval import retrieval_values
from pipeline.evaluation.intervals import interval_of_counts, interval_of_mean
from pipeline.evaluation.multilabel import multilabel_scores, targets_of
from pipeline.evaluation.robustness import robustness
from pipeline.evaluation.scores import classified
from pipeline.evaluation.tables import confusion_matrix, worst_places
from pipeline.views.corruptions import CORRUPTIONS, corrupt


def draws(rows: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return torch.randn(rows, classes, generator=generator) + 1.5 * torch.eye(classes)[labels], labels


def test_the_interval_of_a_share_is_the_binomial_one():
    low, high = interval_of_counts(np.array([300, 100]), lambda drawn: drawn[:, 0] / 400, samples=20_000)
    deviation = (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.004)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.004)


def test_the_interval_of_counts_is_that_of_redrawn_samples():
    values = np.array([1.0] * 37 + [0.0] * 23)
    of_counts = interval_of_counts(np.array([37, 23]), lambda drawn: drawn[:, 0] / 60, samples=20_000)
    assert interval_of_mean(values, samples=20_000) == pytest.approx(of_counts, abs=0.02)


def test_intervals_hold_the_score_and_shrink_with_more_samples():
    widths = []
    for rows in (100, 10_000):
        logits, labels = draws(rows, 5)
        scored = classified(logits, labels, bootstrap_samples=500)
        for metric, (low, high) in scored.intervals.items():
            assert low <= scored.metrics[metric] <= high
        low, high = scored.intervals["mean_per_class"]
        widths.append(high - low)
    assert widths[1] < widths[0] / 5


def test_predictions_are_those_of_the_scores_sample_by_sample():
    logits, labels = draws(200, 4)
    scored = classified(logits, labels, bootstrap_samples=10)
    assert float(scored.predictions["correct"].mean()) == pytest.approx(scored.metrics["top1"])
    confusion = confusion_matrix(scored.predictions, 4)
    assert int(confusion.diagonal().sum()) == int(scored.predictions["correct"].sum())
    assert torch.equal(confusion.sum(dim=1), torch.bincount(labels, minlength=4))
    worst = worst_places(scored.predictions, 5)
    surest = max(scored.predictions["confidence"][i] for i in range(200) if not scored.predictions["correct"][i])
    assert scored.predictions["confidence"][worst[0]] == surest


def test_the_calibration_error_is_that_of_the_paper_by_hand():
    confidence = torch.tensor([0.95, 0.97, 0.62, 0.61])
    correct = torch.tensor([1, 0, 1, 1])
    by_hand = (2 * abs(0.5 - 0.96) + 2 * abs(1.0 - 0.615)) / 4
    assert expected_calibration_error(confidence.double(), correct) == pytest.approx(by_hand)


def test_one_temperature_mends_logits_that_were_scaled():
    logits, _ = draws(20_000, 5, seed=1)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert fitted_temperature(3.0 * logits.double(), labels) == pytest.approx(3.0, rel=0.05)
    scores = calibration_scores(3 * logits, labels, (3 * logits, labels))
    assert scores["ece"] > 0.1 > 0.02 > scores["ece_scaled"]


@pytest.mark.parametrize("rows", [60, 4])  # more than features, and fewer: the dual
def test_few_shots_are_solved_as_a_ridge_regression(rows):
    features, labels = (part[:rows] for part in draws(60, 6))
    scored, _ = draws(9, 6, seed=5)
    mean, deviation = features.mean(0), features.std(0, correction=0) + 1e-5
    design, asked = (
        np.c_[((part - mean) / deviation).numpy(), np.full(len(part), 100.0)] for part in (features, scored)
    )
    ridge = Ridge(alpha=STRENGTH, fit_intercept=False, solver="cholesky").fit(design, 2.0 * np.eye(6)[labels] - 1)
    assert np.allclose(least_squares(features, labels, 6, scored).numpy(), ridge.predict(asked), atol=1e-6)


def test_shots_are_as_many_of_each_class_and_nested():
    labels = torch.arange(100) % 4
    one, five = drawn_shots(labels, 4, 1, seed=3), drawn_shots(labels, 4, 5, seed=3)
    assert torch.equal(torch.bincount(labels[five]), torch.full((4,), 5)) and set(one.tolist()) <= set(five.tolist())
    assert not torch.equal(five, drawn_shots(labels, 4, 5, seed=4))


def test_few_shot_accuracy_grows_with_shots_and_leaves_out_what_is_not_there():
    (train, train_labels), (test, labels) = draws(120, 4), draws(200, 4, seed=9)
    scores = few_shot_scores(train, train_labels, test, labels, 4)
    assert "top1_25shot" not in scores or int(torch.bincount(train_labels).min()) >= 25
    assert scores["top1_10shot"] > scores["top1_1shot"] and scores["top1_1shot_deviation"] > 0


def test_a_class_without_training_images_is_left_out_of_few_shots_and_said():
    (train, train_labels), (test, labels) = draws(120, 4), draws(200, 4, seed=9)
    kept, known = train_labels != 3, labels != 3
    scores = few_shot_scores(train[kept], train_labels[kept], test, labels, 4)
    assert scores["classes_without_images"] == 1 and scores["count"] == 200
    alone = few_shot_scores(train[kept], train_labels[kept], test[known], labels[known], 3)
    assert scores["top1_10shot"] == pytest.approx(alone["top1_10shot"] * float(known.double().mean()))
    assert "classes_without_images" not in alone


@pytest.mark.parametrize("counts", [(2, 1), (1, 1), (9, 1), (30, 1, 1, 1), (12, 12)])
def test_a_linear_probe_is_fitted_to_every_class_however_few_it_has(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    fitted, held = held_back(labels)
    assert set(labels[fitted]) == set(labels) and sorted([*fitted, *held]) == list(range(len(labels)))
    features = torch.eye(len(counts))[labels] + 0.01 * torch.randn(len(labels), len(counts))
    scores = linear_scores(features, torch.from_numpy(labels), features, len(counts) + 1)
    assert torch.isfinite(scores[:, :-1]).all() and torch.isinf(scores[:, -1]).all()


def test_what_is_held_back_of_an_ordinary_dataset_is_a_fifth_of_one_permutation():
    labels = np.arange(500) % 10
    order = np.random.Generator(np.random.Philox(0)).permutation(500)
    fitted, held = held_back(labels)
    assert np.array_equal(held, order[:100]) and np.array_equal(fitted, order[100:])


def test_a_linear_probe_of_one_class_is_a_line():
    with pytest.raises(InputError, match="all 5 training images are of class 3"):
        linear_scores(torch.randn(5, 2), torch.full((5,), 3), torch.randn(2, 2), 4)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_float_image_that_overshoots_is_spoiled_like_one_that_does_not(corruption):
    image = np.linspace(-0.2, 1.2, 32 * 32 * 3, dtype=np.float32).reshape(32, 32, 3)
    clipped = image.clip(0, 1)
    for one in (image, clipped):
        corrupt(one, 7, corruption, 3)
    assert np.array_equal(image, clipped) and 0 <= image.min() <= image.max() <= 1


def test_retrieval_is_the_average_precision_of_scikit_learn():
    (gallery, gallery_labels), (queries, labels) = draws(80, 5), draws(12, 5, seed=2)
    values = retrieval_values(gallery, gallery_labels, queries, labels, chunk=5)
    similarity = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(gallery, dim=1).T
    expected = [
        average_precision_score((gallery_labels == label).numpy(), row.numpy())
        for label, row in zip(labels, similarity, strict=True)
    ]
    assert values["map"].numpy() == pytest.approx(expected)
    nearest = gallery_labels[similarity.argmax(dim=1)] == labels
    assert torch.equal(values["recall_1"].bool(), nearest) and values["recall_10"].sum() >= values["recall_5"].sum()


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(64, 64, 3), (48, 56, 1), (64, 48, 4)])
def test_a_corruption_spoils_more_the_more_severe_it_is_and_the_same_each_time(corruption, shape):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    pattern = 0.5 + 0.4 * np.sin(rows / 2.0) * np.cos(columns / 3.0)
    image = np.rint(255 * np.repeat(pattern[:, :, None], shape[2], axis=2)).astype(np.uint8)
    distances = []
    for severity in (1, 3, 5):
        spoiled, again, other = image.copy(), image.copy(), image.copy()
        corrupt(spoiled, 7, corruption, severity)
        corrupt(again, 7, corruption, severity)
        corrupt(other, 8, corruption, severity)
        assert np.array_equal(spoiled, again)
        if corruption != "motion_blur":  # whose direction may round to the same pixels
            assert np.array_equal(spoiled, other) == ("noise" not in corruption)
        distances.append(float(np.abs(spoiled.astype(float) - image).mean()))
    assert 0 < distances[0] and distances[0] <= distances[1] * 1.05 and distances[1] <= distances[2] * 1.05


def test_robustness_averages_over_all_corruptions_and_severities():
    labels = torch.zeros(10)

    def decide(alter):
        name, severity = alter.keywords["corruption"], alter.keywords["severity"]
        return (torch.arange(10) >= severity) if name == "jpeg" else torch.ones(10, dtype=torch.bool)

    scored = robustness(decide, labels == 0, bootstrap_samples=100)
    assert scored.metrics["top1_jpeg"] == pytest.approx(0.7) and scored.metrics["top1_contrast"] == 1.0
    assert scored.metrics["top1_severity_5"] == pytest.approx(0.95)
    assert scored.metrics["top1"] == pytest.approx(0.97) and scored.metrics["top1_kept"] == pytest.approx(0.97)


def test_several_classes_an_image_are_scored_as_scikit_learn_does():
    from sklearn.metrics import f1_score

    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(60, 5, generator=generator) < 0.3
    targets[:, 4] = False  # a class that nobody has
    logits = torch.randn(60, 5, generator=generator) + 2 * targets
    scores = multilabel_scores(logits, targets)
    truth, said = targets.numpy(), (logits > 0).numpy()
    assert scores["map"] == pytest.approx(average_precision_score(truth[:, :4], logits[:, :4].numpy(), average="macro"))
    assert scores["f1_micro"] == pytest.approx(f1_score(truth, said, average="micro"))
    assert scores["f1_macro"] == pytest.approx(f1_score(truth[:, :4], said[:, :4], average="macro"))


def test_labels_that_stand_for_sets_become_their_classes():
    matrix = np.array([[0, 0, 0], [1, 0, 1], [0, 1, 0]])
    assert targets_of(torch.tensor([1, 0, 2]), matrix).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_a_difference_is_paired_image_by_image():
    ours = torch.tensor([1.0] * 60 + [0.0] * 40)
    theirs = torch.tensor([1.0] * 50 + [0.0] * 50)
    found = differences_from_first({"a": {"x": theirs}, "b": {"x": ours}}, bootstrap_samples=2000)["b"]["x"]
    assert (found["difference"], found["here"], found["there"], found["against"]) == (0.1, 10, 0, "a")
    assert found["p"] == pytest.approx(2 / 2**10) and 0 < found["low"] < 0.1 < found["high"]
    same = differences_from_first({"a": {"x": ours}, "b": {"x": ours}}, bootstrap_samples=10)["b"]["x"]
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1.0)
