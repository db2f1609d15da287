"""Scores and probes: right on what can be counted by hand, and the same at any number of ranks."""

import os
from pathlib import Path

import pytest
import torch

from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder
from pipeline.errors import DataError
from pipeline.evaluation.features import Extraction, extract_features
from pipeline.evaluation.frozen.knn import knn_scores
from pipeline.evaluation.frozen.linear import linear_scores
from pipeline.evaluation.scores import classification_scores
from pipeline.evaluation.single_images import unit_view
from pipeline.registry.locate import ModelSource
from pipeline.shards.index import read_index
from pipeline.shards.reader import Sample
from tests.ranks import run_on_ranks


def test_scores_are_sums_and_counts_divided_once():
    logits = torch.tensor([[9.0, 1, 0], [8, 2, 0], [1, 0, 5], [3, 4, 0]])
    scores = classification_scores(logits, torch.tensor([0, 0, 0, 1]))
    assert scores == {"top1": 0.75, "top5": 1.0, "mean_per_class": pytest.approx((2 / 3 + 1) / 2), "count": 4.0}


def test_a_constant_predictor_gets_the_share_of_its_class():
    logits = torch.zeros(103, 7)
    logits[:, 3] = 1
    labels = torch.arange(103) % 7
    assert classification_scores(logits, labels)["top1"] == pytest.approx((labels == 3).float().mean().item())


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    return torch.eye(4)[labels] * 4 + torch.randn(count, 4, generator=generator) * 0.3, labels


@pytest.mark.parametrize("probe", [knn_scores, linear_scores])
def test_a_probe_separates_what_is_separable(probe):
    (train, train_labels), (test, labels) = clusters(200, 0), clusters(40, 1)
    assert classification_scores(probe(train, train_labels, test, 4).float(), labels)["top1"] == 1.0


def test_nearest_neighbours_vote_as_a_literal_loop_does():
    (train, labels), (test, _) = clusters(50, 2), clusters(5, 3)
    votes = knn_scores(train, labels, test, 4)
    for row, image in enumerate(test):
        similarity = torch.tensor([torch.cosine_similarity(image, other, dim=0) for other in train])
        expected = torch.zeros(4)
        for i in similarity.argsort(descending=True)[:20]:
            expected[labels[i]] += (similarity[i] / 0.07).exp()
        assert torch.allclose(votes[row], expected, rtol=1e-3)


def features_of_test_split(data: str, folder: str, workers: int) -> list | None:
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    config = EncoderConfig(name="vit_ti16", image_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2)
    model = build_encoder(config, 10).eval()
    torch.nn.init.normal_(model.head.weight)
    source = ModelSource(
        "x", "checkpoint", "x", encoder=config.model_dump(), num_classes=10, mean=(0.3,) * 3, std=(0.4,) * 3
    )
    how = Extraction(rank, world_size, torch.device("cpu"), 16, workers, "fp32", Path(folder))
    rows = extract_features(model, source, read_index(data), "test", how)
    if rows is None:
        return None
    return [rows.features.double().sum().item(), (rows.logits.argmax(1) == rows.labels).sum().item(), len(rows.labels)]


@pytest.mark.slow
def test_every_sample_is_seen_once_and_decided_alike_at_any_number_of_ranks(digits, tmp_path):
    answers = [
        run_on_ranks(features_of_test_split, ranks, str(digits), str(tmp_path / str(ranks)), ranks % 2)[0]
        for ranks in (1, 2, 3)
    ]
    assert answers[0][1:] == answers[1][1:] == answers[2][1:] and answers[0][2] == 355
    assert answers[1][0] == pytest.approx(answers[0][0], rel=1e-6)


@pytest.mark.parametrize("content", [b"\x89PNG", b""])
def test_an_image_that_cannot_be_evaluated_is_named(content):
    encoder = EncoderConfig(name="vit_ti16", image_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2)
    source = ModelSource("x", "checkpoint", "x", encoder=encoder.model_dump(), mean=(0.3,) * 3, std=(0.4,) * 3)
    with pytest.raises(DataError, match="test-000000.tar: sample `seven`: cannot be evaluated") as caught:
        unit_view(Sample("seven", content, "png", 7, "test-000000.tar"), source)
    assert (caught.value.cause, caught.value.key) == ("undecodable", "seven")
