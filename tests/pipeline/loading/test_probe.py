"""The probe of `vit plan`: figures as they are, of ranks as they will run."""

import itertools

import pytest
import torch

from pipeline.loading import probe
from tests.pipeline.loading.test_loader import config_of

PLAN = {
    "batches": {
        "global_batch_size": 24, "micro_batch_size": 4, "world_size": 2, "gradient_accumulation_steps": 3,
    },
    "steps": {"steps": 50}, "ranks_per_node": 2, "loader_workers": 0, "accelerators_per_node": 0,
    "precision": "fp32", "training_flops_per_image": 1e9,
}  # fmt: skip
PRODUCT = 2 * 1024**3


@pytest.fixture
def four_cores(monkeypatch):
    """Each rank computes on one of four cores, and every product takes a second."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)


def test_a_model_that_takes_hours_for_an_image_is_not_rounded_to_nothing(digits, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.05)
    figures = probe.probe(config_of(digits), PLAN | {"training_flops_per_image": 1e18})
    assert 0 < figures["model_images_per_second"] < 0.01 and figures["loader_images_per_second"] > 1


@pytest.mark.parametrize(("ranks", "at_once"), [(1, 1), (2, 2), (8, 4)])
def test_ranks_without_accelerators_compute_side_by_side_while_there_are_cores(four_cores, ranks, at_once):
    plan = PLAN | {"ranks_per_node": ranks}
    assert probe.model_speed(plan) == pytest.approx(at_once * probe.EFFICIENCY * PRODUCT / 1e9)


def test_a_plan_for_accelerators_is_not_timed_on_a_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe.model_speed(PLAN | {"accelerators_per_node": 2}) is None


class OneBatch:
    """A loader that ends behind its first batch; its workers made 100 images/s."""

    images_per_second = 100.0

    def __init__(self, *_, **options):
        assert options["ranks_per_node"] == 2  # who share the node's cache
        self.batches = iter([None])

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


@pytest.mark.parametrize(("workers", "speed"), [(0, 200), (2, 200), (4, 100)])
def test_a_run_of_one_batch_is_told_by_the_work_of_its_workers(digits, four_cores, monkeypatch, workers, speed):
    monkeypatch.setattr(probe, "Loader", OneBatch)
    assert probe.loader_speed(config_of(digits), PLAN | {"loader_workers": workers}) == speed
