"""The guard: what counts as bad, and going back to before it, on real ranks."""

import json
import math
import os

import pytest

from pipeline.config.guard import GuardConfig
from pipeline.run_directory import RolledBack, RunDirectory
from pipeline.training.engine import StepResult
from pipeline.training.guard import LEAST, Guard
from tests.pipeline.training.runs import BATCH, new_run, recorded, train_until
from tests.ranks import run_on_ranks


def good(loss: float = 1.0) -> StepResult:
    return StepResult(loss, 0.5, False, False, {})


BAD = StepResult(math.nan, math.inf, True, False, {})


def judge_all(guard: Guard, results: list[StepResult]) -> tuple[int, int] | None:
    """Steps that the guard wants to go back over, counted from 0."""
    for step, result in enumerate(results):
        if (bad := guard.judge(step, result)) is not None:
            return bad
    return None


def test_bad_steps_in_a_row_roll_back_and_a_good_one_among_them_is_forgiven():
    guard = Guard(GuardConfig(max_skipped=3), "fp32")
    assert judge_all(guard, [good(), BAD, BAD, good(), BAD, BAD]) is None and guard.in_doubt
    assert judge_all(Guard(GuardConfig(max_skipped=3), "fp32"), [good(), BAD, BAD, BAD]) == (1, 3)


def test_after_the_last_roll_back_the_run_stops_with_what_to_do():
    for precision, advice in (("fp32", ""), ("bf16", ", or try precision: fp32")):
        guard = Guard(GuardConfig(max_skipped=2, max_roll_backs=2), precision, roll_backs=1)
        assert judge_all(guard, [BAD, BAD]) == (0, 1)
        with pytest.raises(FloatingPointError) as failed:
            judge_all(guard, [BAD, BAD])
        assert str(failed.value).endswith(
            "steps in a row, 1 to 2, after 2 roll-backs; in a new run lower optimizer.learning_rate, clip harder "
            f"with optimizer.max_grad_norm{advice}"
        )


def test_a_leap_of_the_loss_counts_only_when_asked_for_and_against_a_window_it_does_not_enter():
    noisy = [good(1 + 0.01 * (-1) ** step) for step in range(LEAST)]
    leaps = [good(2.0)] * 2
    assert judge_all(Guard(GuardConfig(max_skipped=2), "fp32"), noisy + leaps) is None
    assert judge_all(Guard(GuardConfig(max_skipped=2, spike_threshold=20), "fp32"), noisy + leaps) == (LEAST, LEAST + 1)
    assert judge_all(Guard(GuardConfig(max_skipped=2, spike_threshold=200), "fp32"), noisy + leaps) is None
    assert judge_all(Guard(GuardConfig(max_skipped=2, spike_threshold=20), "fp32"), [*leaps, *noisy, *noisy]) is None
    falling = [good(0.0)] * 2
    assert judge_all(Guard(GuardConfig(max_skipped=2, spike_threshold=20), "fp32"), noisy + falling) is None


def poison(positions: list[int]) -> None:
    """Pixels at these positions are not a number once they are on the device; in this process, from now on."""
    from pipeline.training import loop

    clean = loop.to_device

    def to_device(raw, *arguments):
        batch = clean(raw, *arguments)
        batch.images[[position in positions for position in raw.positions.tolist()]] = math.nan
        return batch

    loop.to_device = to_device


def train_poisoned(run_path: str, attempt: int, stop_at: int, poisoned: list[int]) -> str:
    """`train_until` with poisoned pixels."""
    poison(poisoned)
    try:
        return train_until(run_path, attempt, stop_at)
    except FloatingPointError as error:
        return str(error)


def losses(run: RunDirectory, attempt: int) -> list[tuple[int, float | None]]:
    lines = run.attempt(attempt).ledger.read_text().splitlines()
    return [(entry["step"], entry.get("train/loss")) for entry in map(json.loads, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("every_steps", [4, 1000])
def test_a_bad_window_is_passed_over_from_the_checkpoint_before_it_or_from_the_start(every_steps, pictures, tmp_path):
    settings = ["steps=12", "guard.max_skipped=2", f"checkpoint.every_steps={every_steps}"]
    run = new_run(tmp_path / "run", str(pictures), *settings)
    window = range(5 * BATCH, 7 * BATCH)  # steps 6 and 7; of each one sample is bad, on rank 0 and on rank 1
    poisoned = [5 * BATCH + 1, 7 * BATCH - 1]
    assert run_on_ranks(train_poisoned, 2, str(run.path), 1, 13, poisoned) == ["done"] * 2
    begun_again = 4 if every_steps == 4 else 0
    assert [step for step, _ in losses(run, 1)] == [*range(1, 8), *range(begun_again + 1, 13)]
    assert run.newest_checkpoint().manifest["skipped"] == [[window.start, window.stop]]
    (listed,) = run.attempt(1).rolled_back.glob("*.tsv")
    rows = [line.split("\t") for line in listed.read_text().splitlines()]
    assert [(int(step), int(position)) for step, position, _ in rows] == [(p // BATCH, p) for p in window]
    consumed = dict(recorded(run, repeats=True))
    assert [key for *_, key in rows] == [consumed[position] for position in window]

    told = new_run(tmp_path / "told", str(pictures), *settings, f"data.skipped=[[{window.start},{window.stop}]]")
    assert run_on_ranks(train_until, 2, str(told.path), 1, 13) == ["done"] * 2
    assert losses(run, 1)[-12 + begun_again :] == losses(told, 1)[begun_again:]  # as if it had been known before


@pytest.mark.slow
def test_roll_backs_are_counted_over_restarts_and_the_one_too_many_fails(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures), "guard.max_skipped=2", "guard.max_roll_backs=1")
    poisoned = [*range(2 * BATCH, 4 * BATCH), *range(8 * BATCH, 12 * BATCH, 3)]
    (answer, _) = run_on_ranks(train_poisoned, 2, str(run.path), 1, 5, poisoned)
    assert answer.startswith("stopped on request at step 5")
    (answer, _) = run_on_ranks(train_poisoned, 2, str(run.path), 2, 25, poisoned)
    assert "for 2 steps in a row, 7 to 8, after 1 roll-backs" in answer
    assert run.rolled_back() == [RolledBack(2 * BATCH, 4 * BATCH, first_step=2, last_step=3)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_with_a_finite_gradient_changes_nothing(stage, tmp_path):
    for answer in run_on_ranks(_infinite_loss, 2, stage):
        assert answer == (True, True, False)


def _infinite_loss(stage: int) -> tuple[bool, bool, bool]:
    """(the step was skipped, the state is as before to the bit, a later step was skipped)."""
    import torch

    from pipeline.config import deepspeed
    from pipeline.config.plan import plan_batches
    from pipeline.training.engine import Engine
    from tests.pipeline.training.engine_cases import GLOBAL_BATCH, config_of, global_batch, module_of, rate_of

    deepspeed.STAGE_3_RESIDENT_ELEMENTS = 0
    config, rank = config_of(stage, micro_batch=4), int(os.environ["RANK"])
    module = module_of(config)
    engine = Engine(module, config, plan_batches(GLOBAL_BATCH, 4, 2), precision="fp32")
    share = global_batch(0)
    share = [share._replace(images=share.images[4 * rank :][:4], labels=share.labels[4 * rank :][:4],
                            positions=share.positions[4 * rank :][:4])]  # fmt: skip
    engine.step(share, rate_of(0), stop=False)
    before = {kind: [flat.clone() for flat in flats] for kind, flats in engine.state.tensors().items()}
    forward = module.forward

    def infinite(batch):
        outcome = forward(batch)
        return outcome._replace(loss=outcome.loss + (math.inf if rank == 1 else 0.0))

    module.forward = infinite
    result = engine.step(share, rate_of(1), stop=False)
    module.forward = forward
    after = engine.state.tensors()
    equal = all(torch.equal(a, b) for kind in before for a, b in zip(before[kind], after[kind], strict=True))
    updates = engine.state.updates
    later = engine.step(share, rate_of(2), stop=False)
    assert (updates, engine.state.updates) == (1, 2)
    return result.skipped, equal, later.skipped
