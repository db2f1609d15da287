"""The real engine on real ranks: every backend reads what any other wrote, and skips what is not finite."""

import pytest

from tests.pipeline.training.engine_cases import config_of, saved_weights, train_on_engine, train_plainly
from tests.ranks import run_on_ranks

STEPS, STOP = 8, 4
pytestmark = pytest.mark.slow


def worst(ours, theirs) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


@pytest.fixture(scope="module")
def reference():
    return train_plainly(config_of(0, micro_batch=8), STEPS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.mark.parametrize(
    ("saved", "resumed"), [((0, 2), (1, 2)), ((1, 2), (3, 2)), ((3, 2), (0, 1)), ((2, 2), (2, 1)), ((1, 2), (1, 2))]
)
def test_a_checkpoint_is_read_at_any_stage_and_world_size(saved, resumed, reference, folders):
    name = "-".join(map(str, saved + resumed))
    half, whole = str(folders / f"half-{name}"), str(folders / f"whole-{name}")
    run_on_ranks(train_on_engine, saved[1], config_of(saved[0], micro_batch=4), STOP, half)
    run_on_ranks(_resume, resumed[1], config_of(resumed[0], micro_batch=4), STEPS, whole, half)
    assert worst(saved_weights(whole), reference[1]) < 5e-6
    direct = str(folders / f"{saved[0]}-direct")
    run_on_ranks(train_on_engine, saved[1], config_of(saved[0], micro_batch=4), STEPS, direct)
    assert worst(saved_weights(whole, average=True), saved_weights(direct, average=True)) < 5e-6
    if saved == resumed:  # the same topology goes on to the last bit
        assert worst(saved_weights(whole), saved_weights(direct)) == 0.0


def _resume(config, steps: int, folder: str, half: str):
    return train_on_engine(config, steps, folder, resume_from=half)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(stage, folders):
    clean, poisoned = str(folders / f"clean-{stage}"), str(folders / f"poisoned-{stage}")
    run_on_ranks(train_on_engine, 2, config_of(stage, micro_batch=4), 2, clean)
    traces = run_on_ranks(_poisoned, 2, config_of(stage, micro_batch=4), 3, poisoned)
    assert [[skipped for *_, skipped in trace] for trace in traces] == [[False, False, True]] * 2
    assert worst(saved_weights(poisoned), saved_weights(clean)) == 0.0


def _poisoned(config, steps: int, folder: str):
    return train_on_engine(config, steps, folder, poison_step=steps - 1)
