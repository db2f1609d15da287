"""The benchmarks of the training step at sizes that take seconds; the figures themselves are never tested."""

import json

import pytest

from pipeline.shards.index import read_index
from tests.benchmarks import mfu
from tests.benchmarks.comm_volume import Case, count, gradient_buckets, least_bytes
from tests.benchmarks.contestant import Contestant, ContestantError, Round
from tests.benchmarks.environments import interpreter
from tests.benchmarks.step_overhead import TURN_STEPS, added_milliseconds, one_round, started
from tests.benchmarks.training_loops import BATCH_SIZE
from tests.pipeline.pictures import small_dataset
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("stage", "accumulation", "psi"), [(0, 1, 2), (1, 1, 3), (1, 2, 3), (2, 2, 5)])
def test_gradients_and_weights_are_counted_as_they_lie_on_the_wire(stage, accumulation, psi):
    """Of a small network, whose gradients are reduced to all ranks and not to their owners."""
    case = Case("ours", stage, accumulation=accumulation, small=True)
    traffic = run_on_ranks(count, 2, case, 1)[0]
    assert traffic.wire_bytes() == pytest.approx(4 * psi * traffic.parameters, rel=0.02)  # a small network is padded
    assert least_bytes(case, traffic) == 8 * traffic.parameters


def test_vit_l_has_at_least_four_gradient_buckets():
    assert gradient_buckets("vit_l16") >= 4


@pytest.mark.parametrize("stage", [0, 1])
def test_our_loop_takes_turns_with_bare_steps_on_its_own_network(tmp_path, stage):
    with started(f"ours-{stage}", tmp_path) as ours:
        round_ = one_round(ours, turns=2)
    assert round_.cpu_seconds > 0 and round_.bare_cpu_seconds > 0
    lines = (tmp_path / f"run-{stage}" / "attempts" / "01" / "metrics.jsonl").read_text().splitlines()
    made = 2 * (1 + TURN_STEPS)  # the first of each turn does not count
    assert len(lines) == json.loads(lines[-1])["step"] == made  # each step of ours is on the record


def test_a_loop_that_cannot_run_is_named_with_its_reason(tmp_path):
    program = "tests.benchmarks.training_loops"
    with Contestant(interpreter(()), "none-0", tmp_path, program=program) as contestant:
        with pytest.raises(ContestantError, match="KeyError.*none"):
            contestant.run(BATCH_SIZE)


def test_what_a_loop_adds_is_paired_by_round():
    taken = [Round(2e-3, 0, 1e-3), Round(5e-3, 0, 4e-3)]
    assert added_milliseconds(taken) == pytest.approx((BATCH_SIZE, BATCH_SIZE, BATCH_SIZE))


@pytest.mark.parametrize(("system", "fed"), [("ours", True), ("plain PyTorch", False)])
def test_model_flops_are_held_against_a_product_of_the_same_process(system, fed, pictures):
    case = mfu.Case("vit_ti16", "supervised", 4, system=system, fed=fed)
    sizes = {"image_size": 32, "patch_size": 16, "depth": 1}
    speed = run_on_ranks(_measured, 1, case, pictures, sizes)[0]
    assert speed.images_per_second > 0 and 0 < speed.utilisation
    assert speed.flops_per_image == 6 * (5 * 12 * 192**2 + 2 * 5**2 * 192 + 4 * 768 * 192 + 192 * 1000)


def _measured(case, index, sizes):
    return mfu.measure(case, 2, 64, index, **sizes)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    small_dataset(folder)
    return read_index(folder / "dataset")


def test_without_a_gpu_model_flops_are_not_claimed(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    text, result = mfu.mfu()
    assert text.startswith("not measured") and not result["ok"] and "no CUDA GPU" in result["skipped"]
