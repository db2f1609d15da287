"""A run takes its own checkpoints, whatever it may change on its way, and no others."""

import json

import pytest

from pipeline.checkpoints.identity import facts_of_run, require_own
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory, write_json
from tests.pipeline.checkpoints.prepared import SAVED, prepared_run


def facts(run: RunDirectory, **more) -> dict:
    return json.loads(json.dumps(facts_of_run(read_run_config(run.path), run.plan()))) | more


def differing(theirs: dict, ours: RunDirectory) -> str | None:
    """What the refusal says differs; None where there is none."""
    try:
        require_own(theirs, ours, "there")
    except InputError as error:
        return str(error).partition("(its ")[2].partition(")")[0]
    return None


def test_what_may_change_on_the_way_makes_no_other_run(tmp_path):
    before = prepared_run(tmp_path / "disk" / "a")
    settings = (
        "zero.stage=3",
        "micro_batch_size=8",
        "checkpoint.mirror=file:///m",
        "data.verify=full",
        "compile=false",
    )
    assert differing(facts(before, step=4), prepared_run(tmp_path / "other disk" / "a", *settings)) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["seed=7", "optimizer.learning_rate=2e-3"], "optimizer.learning_rate, seed differ"),
        (["objective={kind: mae}"], "objective.kind differs"),
        (["steps=30"], "steps differs"),
        (["data.lanes=4"], "data.lanes differs"),
    ],
)
def test_another_run_is_told_by_what_differs(tmp_path, settings, words):
    assert differing(facts(prepared_run(tmp_path / "a"), step=4), prepared_run(tmp_path / "b", *settings)) == words


def test_other_images_make_another_run(tmp_path):
    run = prepared_run(tmp_path / "a")
    theirs = facts(run)
    write_json(run.plan_file, run.plan() | {"data": {"fingerprint": "1" * 64}})
    assert differing(theirs, run) == "data differs"


def test_a_run_at_a_constant_rate_that_was_made_longer_is_itself_until_it_had_cooled_down(tmp_path):
    constant = ("optimizer.schedule=constant", "optimizer.cooldown=5")
    theirs = facts(prepared_run(tmp_path / "a", *constant))
    longer = prepared_run(tmp_path / "b", *constant, "steps=40")
    assert differing(theirs | {"step": 15}, longer) is None
    assert differing(theirs | {"step": 16}, longer) == "steps differs"


def test_a_manifest_of_old_is_compared_by_what_it_says(tmp_path):
    theirs = json.loads((SAVED / "manifest.json").read_text())
    assert differing(theirs, prepared_run(tmp_path / "a")) is None
    assert differing(theirs, prepared_run(tmp_path / "b", "encoder.depth=2")) == "encoder.depth differs"


def test_keys_that_only_one_of_two_versions_of_the_program_knows_are_not_compared(tmp_path):
    run = prepared_run(tmp_path / "a")
    theirs = facts(run)
    theirs["config"] |= {"of_tomorrow": 1}
    del theirs["config"]["ema_decay"]
    assert differing(theirs, run) is None
