"""What a reader of the ledgers is given: every step once, and what was made anew as it became."""

import json

import pytest

from pipeline.registry.ledger_cursor import LedgerCursor
from pipeline.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def append(run, attempt, steps, *, loss=1.0, rate=0.1):
    with open(run.attempt(attempt).make().ledger, "a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "train/loss": loss, "train/learning_rate": rate}) + "\n")


def read(run):
    return [(line["step"], line["train/loss"]) for lines in LedgerCursor(run, "cursor.json").fresh() for line in lines]


@pytest.mark.parametrize("reads", [1, 2])
def test_what_an_attempt_makes_anew_is_told_and_what_a_later_one_repeats_is_not(run, reads):
    append(run, 1, range(1, 6))
    told = read(run) if reads == 2 else []
    append(run, 1, range(4, 7), loss=2.0)  # rolled back over steps 4 and 5
    told += read(run)
    assert dict(told) == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 2.0}
    assert len(told) == {1: 6, 2: 8}[reads]
    append(run, 2, range(5, 9), loss=2.0)  # killed behind the checkpoint of step 4
    assert read(run) == [(7, 2.0), (8, 2.0)]
    assert read(run) == []


def test_steps_made_anew_at_another_rate_are_told(run):
    append(run, 1, range(1, 4))
    append(run, 1, range(4, 6), rate=0.05)  # it cooled down ...
    assert len(read(run)) == 5
    append(run, 2, range(3, 8), loss=3.0)  # ... and was made longer from step 2
    assert read(run) == [(4, 3.0), (5, 3.0), (6, 3.0), (7, 3.0)]
