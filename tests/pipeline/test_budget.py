"""The budget of a run: hours of all ranks over all attempts."""

import json
import time

import pytest

from pipeline.budget import Budget, hours_of, rank_hours, require_hours_left
from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory


def ran(run: RunDirectory, number: int, hours: float, ranks: int) -> None:
    beat = {"started": 1000.0, "time": 1000.0 + 3600 * hours, "ranks": dict.fromkeys(map(str, range(ranks)), 1)}
    (run.attempt(number).make().path / "heartbeat" / "node-000").write_text(json.dumps(beat))


def test_hours_of_all_ranks_of_all_attempts_before_are_counted(tmp_path):
    run = RunDirectory(tmp_path)
    ran(run, 1, 2.0, 2)
    ran(run, 2, 1.5, 4)
    assert rank_hours(run.attempt(1)) == pytest.approx(4)
    third = run.attempt(3).make()
    budget = Budget.of(run, third, 10.5, 2)
    assert budget.used == pytest.approx(10, abs=0.01) and not budget.is_spent
    assert Budget(10.5, 10.0, 2, time.time() - 1800).is_spent
    with pytest.raises(InputError, match=r"budget_gpu_hours: 9 and 10 are used; to go on say `vit resume .*=N`"):
        Budget.of(run, third, 9, 2)
    assert not Budget.of(run, third, None, 2).is_spent


def test_a_run_of_a_sequence_has_the_hours_of_its_own_ledger(tmp_path):
    run = RunDirectory(tmp_path)
    run.plan_file.write_text(json.dumps({"world_size": 2}))
    lines = [{"step": step, "time": 1000.0 + 360 * step, "perf/last_step_seconds": 360.0} for step in (1, 2, 3)]
    run.attempt(1).make().ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert hours_of(run) == pytest.approx(2 * 3 * 0.1)
    run.attempt(1).ledger.write_text("")
    assert hours_of(run) == 0


def test_a_spent_budget_is_said_before_a_job_is_submitted_and_not_of_one_that_runs(tmp_path):
    run = RunDirectory(tmp_path)
    ran(run, 1, 2.0, 2)
    require_hours_left(run, 3.0)
    run.attempt(1).write_verdict(75, "stopped")
    require_hours_left(run, 4.5)
    require_hours_left(run, None)
    with pytest.raises(InputError, match="budget_gpu_hours: 3 and 4 are used"):
        require_hours_left(run, 3.0)


def test_a_stop_is_said_to_be_on_request_or_for_the_budget():
    assert Budget(None, 0.0, 2, time.time()).why_stopped == "stopped on request"
    assert Budget(1, 1.25, 2, time.time()).why_stopped == "budget_gpu_hours 1 is spent (1.25 used): stopped"
