"""Saving behind the training on real ranks: what is on disk is whole, and a write that failed ends all ranks."""

import pytest

from pipeline.run_directory import RunDirectory
from tests.pipeline.training import saver_cases
from tests.ranks import run_on_ranks, start_on_ranks

pytestmark = pytest.mark.slow


def test_training_goes_on_while_a_checkpoint_is_written_and_a_failed_write_ends_all_ranks(tmp_path):
    answers = run_on_ranks(saver_cases.train_while_writing, 2, str(tmp_path))
    for found in answers:
        assert (found["while writing"], found["saved"], found["newest"]) == (0, 2, 2)
        assert found["damaged"] == 0  # as it was when the state was copied
        assert found["unlike the state that was saved"] == 0.0
        assert found["full disk"].endswith("rank 1: /data/rank-1: cannot be written: No space left on device")
        assert found["known after steps"] <= 2
        assert "attempt 1 was replaced by attempt 2; it may not commit" in found["cut-off attempt"]


def test_what_a_save_waits_for_the_one_before_is_counted_as_its_cost(tmp_path):
    (seconds, stalls), _ = run_on_ranks(saver_cases.save_before_the_last_is_written, 2, str(tmp_path))
    assert seconds > 0.3 and stalls[0] < 0.3
    assert stalls[1] == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_changes_only_when_its_copy_is_through(stage, tmp_path):
    for found in run_on_ranks(saver_cases.change_while_copying, 2, str(tmp_path), stage):
        assert found["step"] == found["validation"] == 0.0
        assert found["step, save"] < 0.4 and found["validation, save"] < 0.4  # training does not wait for the copy
        assert found["step, waited"] > 0.05 and found["validation, waited"] > 0.05  # only the change does


def test_ranks_killed_between_writing_and_commit_leave_the_checkpoint_before(tmp_path):
    ranks, _queue = start_on_ranks(saver_cases.die_before_the_commit, 2, str(tmp_path))
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == -9
    run = RunDirectory(tmp_path)
    assert len(list((run.checkpoints / "step-00000002.attempt-01.partial").glob("*"))) == 5
    assert run.newest_checkpoint().step == 1
