"""`vit replay`: a step again, at another world size, and which of its samples was bad."""

import os
import subprocess
import sys

import pytest

from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory
from pipeline.training.replay import _require_step
from tests.pipeline.training.runs import BATCH, new_run, train_until
from tests.pipeline.training.test_guard import poison, train_poisoned
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> RunDirectory:
    made = new_run(tmp_path_factory.mktemp("replayed"), str(pictures), "steps=10", "checkpoint.every_steps=4")
    assert run_on_ranks(train_until, 2, str(made.path), 1, 11) == ["done"] * 2
    return made


def replayed(run_path: str, numbers: list[int], poisoned: list[int] = []) -> list:
    """What `replay` gives for each step that the ledger calls by `numbers`, with poisoned pixels at some positions."""
    from pipeline.training.replay import replay

    poison(poisoned)
    return [replay(RunDirectory(run_path), number) for number in numbers]


def files_of(run: RunDirectory) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_again_at_another_world_size_has_the_loss_and_gradient_of_the_ledger(ranks, run):
    before = files_of(run)
    steps = run_on_ranks(replayed, ranks, str(run.path), [3, 9])[0]
    for step, number, newest in zip(steps, (3, 9), (0, 8), strict=True):
        assert step.result.loss == pytest.approx(step.recorded["train/loss"], abs=1e-5)
        assert step.result.gradient_norm == pytest.approx(step.recorded["train/gradient_norm"], abs=1e-4)
        assert step.begun_at == newest and step.recorded["step"] == number
        assert sorted(one.position for one in step.samples) == [*range((number - 1) * BATCH, number * BATCH)]
        mean = sum(one.loss for one in step.samples) / BATCH
        assert mean == pytest.approx(step.result.loss, abs=1e-5)
    assert files_of(run) == before


def test_a_step_that_was_rolled_back_is_repeated_with_its_bad_sample_first(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures), "steps=8", "guard.max_skipped=2", "checkpoint.every_steps=4")
    bad = [5 * BATCH + 3, 6 * BATCH + 8]
    assert run_on_ranks(train_poisoned, 2, str(run.path), 1, 9, bad) == ["done"] * 2
    (before, second, after) = run_on_ranks(replayed, 1, str(run.path), [5, 7, 8], bad)[0]
    assert not before.result.skipped and not after.result.skipped
    assert second.result.skipped and second.samples[0].position == bad[1]
    assert all(one.loss < 10 for one in second.samples[1:])
    assert after.result.loss == pytest.approx(after.recorded["train/loss"], abs=1e-5)


def test_the_command_tells_of_the_step_and_refuses_one_that_there_is_none(run, tmp_path):
    def vit(step: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "flows", "replay", str(run.path), str(step)]
        environment = os.environ | {"VIT_HOME": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    done = vit(10)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"step 10 of {run.path}, from step 8, world size 1" and len(lines) == 4 + BATCH
    loss, _, _, _, recorded = lines[1].split()[1:]
    assert float(loss) == pytest.approx(float(recorded.rstrip(")")), abs=1e-5)
    refused = vit(11)
    assert (refused.returncode, refused.stderr) == (2, f"STEP 11: {run.path} has steps 1 to 10\n")


def test_a_step_that_was_not_made_yet_is_refused(run):
    config, longer = read_run_config(run.path), {"stage": "pretrain", "steps": {"steps": 99}}
    with pytest.raises(InputError, match="STEP 11: .* has made 10 steps so far"):
        _require_step(run, config, longer, 11)
    _require_step(run, config, longer, 10)


def test_an_evaluation_has_no_steps(run):

    with pytest.raises(InputError, match="a run of stage evaluate has no steps"):
        _require_step(run, object(), {"stage": "evaluate"}, 1)
