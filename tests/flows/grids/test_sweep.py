"""Sweeps: which settings are swept, and real runs of a small one on this machine, with their table."""

import csv
import json

import pytest

from flows.command_line.commands import sweep_command
from flows.control.jobs import Conclusion
from flows.grids.sweeping import carry_out, prepared_sweep, run_names, split_settings
from pipeline.config.training import PretrainConfig
from pipeline.errors import EXIT_FAULT, EXIT_STOPPED, InputError
from pipeline.run_directory import RunDirectory


def test_lists_are_swept_unless_the_key_takes_one():
    fixed, swept = split_settings(
        [
            "optimizer.learning_rate=[1e-3,3e-4]", "steps=3", "optimizer.betas=[0.9,0.99]", "writers=[tensorboard]",
            "encoder.image_size=[[192,256],[224,224]]", "data.skipped=[[0,4],[8,12]]", "objective.mask_ratio=[0.5]",
            "profile.ranks_per_node=[1,2]", "nonsense.key=[1,2]",
        ],
        PretrainConfig,
    )  # fmt: skip
    assert fixed == [
        "steps=3", "optimizer.betas=[0.9,0.99]", "writers=[tensorboard]", "data.skipped=[[0,4],[8,12]]"
    ]  # fmt: skip
    assert swept == {
        "optimizer.learning_rate": ["1e-3", "3e-4"], "encoder.image_size": [[192, 256], [224, 224]],
        "objective.mask_ratio": [0.5], "profile.ranks_per_node": [1, 2], "nonsense.key": [1, 2],
    }  # fmt: skip


def test_runs_are_named_by_the_values_in_which_they_differ():
    assert run_names([{"optimizer.learning_rate": "1e-3", "encoder.image_size": [192, 256]}]) == [
        "learning_rate=1e-3,image_size=192x256"
    ]
    assert run_names([{"encoder.depth": 2, "objective.decoder.depth": 1}]) == [
        "encoder.depth=2,objective.decoder.depth=1"
    ]
    assert run_names([{"initialise_from": "models:/a@b/../c"}]) == ["initialise_from=models__a_b_.._c"]


def test_a_sweep_with_a_wrong_value_writes_no_run_at_all(home, digits):
    with pytest.raises(InputError, match="optimizer.learning_rate: expected a number"):
        prepared_sweep(
            "pretrain_mae_debug", data=str(digits), profile="local", home=home,
            overrides=["optimizer.learning_rate=[1e-3,fast]"],
        )  # fmt: skip
    assert not list(home.glob("runs/*"))
    with pytest.raises(InputError, match="nothing to sweep: give a setting several values"):
        prepared_sweep("pretrain_mae_debug", data=str(digits), profile="local", overrides=["steps=3"], home=home)


def test_a_sweep_that_is_stopped_begins_none_of_the_runs_that_are_left(home, digits):
    settings = ["optimizer.learning_rate=[1e-3,3e-4,1e-4]", "steps=2", "profile.ranks_per_node=1"]
    sweep = prepared_sweep("pretrain_mae_debug", data=str(digits), profile="local", overrides=settings, home=home)
    begun, said = [], []

    def bring(run, report) -> Conclusion:
        begun.append(run)
        code, reason = (EXIT_FAULT, "a device fell off") if len(begun) == 1 else (EXIT_STOPPED, "stopped on request")
        return Conclusion(code, reason, run, {})

    code, message = carry_out(sweep, said.append, bring)
    assert begun == list(sweep.runs[:2])  # a fault holds nobody up
    assert code == EXIT_FAULT and message.endswith(": 0 of 3 runs done")
    assert [row["state"] for row in json.loads((sweep.directory / "sweep.json").read_text())["rows"]] == ["new"] * 3


@pytest.mark.slow
def test_a_sweep_trains_every_combination_once_and_ends_with_a_table(home, digits):
    def sweep(*more: str) -> list[str]:
        said: list[str] = []
        settings = ["optimizer.learning_rate=[1e-3,3e-4]", "steps=2", "profile.ranks_per_node=1", *more]
        assert sweep_command("pretrain_mae_debug", [str(digits)], "local", settings, str(home), said.append) == 0
        return said

    said = sweep()
    assert sum(line.startswith("engine ") for line in said) == 1 and not any(": engine " in line for line in said)
    (table,) = home.glob("runs/*-sweep-*/sweep.json")
    rows = json.loads(table.read_text())["rows"]
    assert [row["settings"] for row in rows] == [{"optimizer.learning_rate": 0.001}, {"optimizer.learning_rate": 3e-4}]
    assert all(row["state"] == "done" and row["step"] == row["steps"] == 2 and row["loss"] > 0 for row in rows)
    assert [RunDirectory(row["run"]).path.name for row in rows] == ["learning_rate=1e-3", "learning_rate=3e-4"]
    with open(table.with_suffix(".csv")) as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    (header,) = [number for number, line in enumerate(said) if line.startswith("optimizer.learning_rate  ")]
    assert said[header + 1].split()[:2] == ["0.001", "2/2"] and said[-1].endswith(": 2 of 2 runs done")

    failed = RunDirectory(rows[1]["run"])
    failed.result_file.unlink()
    said = sweep()  # the same sweep: one is done, the other goes on from its last checkpoint
    assert "2 runs, 1 done" in said[0] and failed.result_file.is_file() and failed.last_attempt() == 2
    assert RunDirectory(rows[0]["run"]).last_attempt() == 1
    assert len(list(home.glob("runs/*-sweep-*"))) == 1
