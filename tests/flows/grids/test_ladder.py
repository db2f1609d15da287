"""Ladders: what is refused before anything is written, which rungs there are, and what comes of those that end."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.command_line.commands import ladder_command, training_command
from flows.control.jobs import Conclusion
from flows.grids.laddering import carry_out, plan_lines, planned_ladder
from pipeline.config.ingest import IngestConfig
from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, InputError
from pipeline.ingestion.build import ingest
from pipeline.loading.selection import Selection
from pipeline.loading.sources import open_sources
from pipeline.run_directory import RunDirectory, write_json
from pipeline.shards.reader import node_readers

RECIPE = "pretrain_supervised_debug"
SHORT = ["epochs=2", "profile.ranks_per_node=1"]


@pytest.fixture(scope="module")
def with_validation(tmp_path_factory):
    """The handwritten digits with a split for validation."""
    directory = tmp_path_factory.mktemp("datasets") / "digits-in-three"
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}
    ingest("sklearn:digits", directory, IngestConfig(splits="hash", split_fractions=shares))
    return str(directory)


def planned(home, data, *settings, recipe=RECIPE):
    return planned_ladder(recipe, data=data, profile="local", overrides=[*SHORT, *settings], home=home)


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        (RECIPE, ["ladder.size=[ti]"], "--set ladder.size: no such key; did you mean `sizes`?"),
        (RECIPE, ["ladder.sizes=[b]"], "--set ladder.sizes: b is no smaller than the recipe's encoder"),
        (RECIPE, ["ladder.fractions=[0.1,0.1]"], "--set ladder.fractions: "),
        (RECIPE, ["ladder.fractions=[1.5]"], "--set ladder.fractions: "),
        (RECIPE, ["ladder.fractions=[0.5]"], "--set ladder: 2 rungs, and a fit needs 5; give more ladder.fractions"),
        (RECIPE, ["ladder.budget_hours=1e-9"], "the 5 cheapest rungs, which a fit needs, take about"),
        (RECIPE, ["ladder.protocol=classify-v1"], "--set ladder.protocol: "),
        (RECIPE, ["optimizer.lerning_rate=1"], "lerning_rate"),
        ("finetune_small", [], "finetune_small: stage: a ladder is of recipes of stage pretrain"),
        ("pretrain_nothing", [], "pretrain_nothing"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused_in_a_line_and_writes_nothing(
    home, with_validation, recipe, settings, words
):
    with pytest.raises(InputError) as error:
        planned(home, with_validation, *settings, recipe=recipe)
    assert words in str(error.value) and len(error.value.problems) == 1 and not list(home.glob("*/*"))


def test_without_a_split_for_validation_no_rung_can_be_scored(home, digits):
    with pytest.raises(InputError, match="has no split `validation`, on which rungs are scored; ingest .*splits=hash"):
        planned(home, str(digits))


def test_a_run_that_is_too_short_for_validation_is_told_so_and_not_that_a_split_is_missing(home, with_validation):
    settings = {"data": with_validation, "profile": "local", "home": home}
    with pytest.raises(InputError, match="it is off: .* 20 steps is shorter than an epoch; --set validation.every_st"):
        planned_ladder(RECIPE, overrides=["profile.ranks_per_node=1"], **settings)
    assert planned_ladder(RECIPE, overrides=["validation.every_steps=20"], **settings).score.name == "accuracy"


def test_a_dry_run_shows_the_rungs_with_what_they_take_and_writes_nothing(home, with_validation):
    said: list[str] = []
    assert ladder_command(RECIPE, [with_validation], "local", SHORT, True, str(home), said.append) == 0
    assert "scored by its own head on `validation`" in said[0] and said[1].split()[0] == "rung"
    assert [line.split()[0] for line in said[2:8]] == [f"{size}-{share}" for size in ("half", "own")
                                                      for share in ("0.1", "0.2", "0.4")]  # fmt: skip
    assert "6 rungs, about" in said[8] and said[9].endswith("20 s each to start and end; no past runs to learn from")
    assert not home.exists()


def test_sizes_of_other_names_are_their_encoders_and_everything_else_stays(home, with_validation):
    plan = planned(home, with_validation, "encoder.embed_dim=768", "encoder.num_heads=12", "encoder.depth=12")
    assert list(plan.rungs) == ["ti-0.1", "ti-0.2", "ti-0.4", "s-0.1", "s-0.2", "s-0.4"]
    encoder, full = plan.rungs["s-0.1"].config.encoder, plan.full.config.encoder
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads) == (384, 12, 6)
    assert (encoder.image_size, encoder.patch_size, encoder.pooling) == (full.image_size, full.patch_size, full.pooling)
    assert plan.rungs["s-0.1"].config.epochs == 2


def test_slices_lie_within_each_other_and_lengths_in_steps_shrink_with_them(home, with_validation):
    plan = planned_ladder(RECIPE, data=with_validation, profile="local", overrides=["steps=100"], home=home)
    slices = []
    for fraction, steps in ((0.1, 10), (0.2, 20), (0.4, 40)):
        config = plan.rungs[f"own-{fraction}"].config
        assert config.steps == steps
        readers, _ = node_readers(open_sources(config.data).indexes, "train")
        chosen = Selection.of(readers[0], config.data.label_fraction)
        slices.append({(shard, int(sample)) for shard, samples in enumerate(chosen.chosen) for sample in samples})
    assert slices[0] < slices[1] < slices[2]


def test_the_health_of_short_rungs_is_measured_too_and_is_off_where_the_run_has_none(home, with_validation):
    plan = planned(home, with_validation, "epochs=100")
    full = plan.full.config.health
    for name, rung in plan.rungs.items():
        steps, every = rung.plan["steps"]["steps"], rung.config.health.every_steps
        assert 9 <= steps // every and every <= full.every_steps and rung.config.health.images == full.images, name
    off = planned(home, with_validation, "health.every_steps=0")
    assert {rung.config.health.every_steps for rung in off.rungs.values()} == {0}


def test_the_dearest_rungs_are_left_out_for_the_budget_and_named(home, with_validation):
    hours = planned(home, with_validation).hours
    plan = planned(home, with_validation, f"ladder.budget_hours={0.99 * sum(hours.values())}")
    assert list(plan.rungs) == [name for name in hours if name != "own-0.4"]
    assert any("left out for ladder.budget_hours" in line and line.endswith(": own-0.4") for line in plan_lines(plan))


class Trained:
    """Brings a run to the end that it is told; its accuracy follows a law of images and parameters."""

    def __init__(self, failing=(), stopping=None):
        self.failing, self.stopping, self.brought = set(failing), stopping, []

    def __call__(self, run: RunDirectory, report) -> Conclusion:
        self.brought.append(run.path.name)
        if run.path.name == self.stopping:
            return Conclusion(EXIT_STOPPED, "stopped on request", run, {})
        if run.path.name in self.failing:
            return Conclusion(EXIT_FAULT, "a device fell off", run, {})
        plan = run.plan()
        error = 0.05 + 3 * plan["steps"]["samples"] ** -0.3 * plan["parameters"] ** -0.05
        best = {"metric": "validation/accuracy", "value": 1 - error}
        write_json(run.result_file, {"stage": "pretrain", "steps": plan["steps"]["steps"], "best": best, "metrics": {}})
        return Conclusion(EXIT_DONE, "done", run, {})


def test_a_later_run_of_the_recipe_is_told_what_the_ladder_found(home, with_validation):
    plan, said = planned(home, with_validation), []
    code, message = carry_out(plan, said.append, Trained())
    assert code == EXIT_DONE and "6 of 6 rungs; the full run: accuracy 0." in message
    written = json.loads((plan.directory / "ladder.json").read_text())
    assert written["forecast"]["accuracy"]["low"] < written["forecast"]["accuracy"]["high"] and "bands" not in written
    assert len(list((home / "runs").iterdir())) == 6  # links, so that other commands find them
    again = Trained()
    assert carry_out(planned(home, with_validation), said.append, again)[0] == EXIT_DONE and again.brought == []

    def prepare(*settings: str) -> RunDirectory:
        lines: list[str] = []
        arguments = {"data": [with_validation], "profile": "local", "dry_run": True, "rehearse": None, "run_dir": None,
                     "directory": str(home), "model": None, "watch": False}  # fmt: skip
        training_command("pretrain", RECIPE, overrides=[*SHORT, *settings], say=lines.append, **arguments)
        return RunDirectory(next(path.parent for path in map(_path, lines) if path is not None))

    run = prepare()
    told = json.loads((run.path / "forecast.json").read_text())
    assert told["forecasts"]["accuracy"] == written["forecast"]["accuracy"] | {
        "unit": "share", "metric": "validation/accuracy"
    }  # fmt: skip
    assert told["basis"] == f"6 rungs of ladder {plan.directory.name} (accuracy)"
    other = prepare("optimizer.learning_rate=0.01")
    assert not (other.path / "forecast.json").exists()
    assert "is not used: optimizer.learning_rate is" in other.plan()["notes"][-1]
    run.attempt(1).make()
    (plan.directory / "ladder.json").unlink()
    assert (
        prepare().path == run.path and (run.path / "forecast.json").exists()
    )  # what was said of a run that began stays


def _path(line: str):
    head = line.splitlines()[0] if line else ""
    return Path(head.removeprefix("# ")) if head.startswith("# ") and head.endswith("config.yaml") else None


def test_a_rung_that_fails_holds_nobody_up_and_the_fit_says_that_it_is_missing(home, with_validation):
    plan, said = planned(home, with_validation), []
    code, message = carry_out(plan, said.append, Trained(failing=["own-0.2"]))
    assert code == EXIT_FAULT
    assert "5 of 6 rungs, without own-0.2 (a device fell off); the full run: accuracy 0." in message
    code, message = carry_out(plan, said.append, again := Trained())
    assert code == EXIT_DONE and again.brought == ["own-0.2"] and "6 of 6 rungs; the full run" in message


def test_too_few_rungs_say_so_and_make_no_interval(home, with_validation):
    plan, said = planned(home, with_validation), []
    _, message = carry_out(plan, said.append, Trained(failing=["own-0.2", "own-0.1"]))
    assert message.endswith("; no forecast of the full run: 4 runs, and a fit needs 5 that differ")
    assert "forecast" not in json.loads((plan.directory / "ladder.json").read_text())


def test_a_ladder_that_is_stopped_begins_no_further_rung_and_goes_on_later(home, with_validation):
    plan, said = planned(home, with_validation), []
    stopped = Trained(stopping="half-0.2")
    code, message = carry_out(plan, said.append, stopped)
    assert code == EXIT_STOPPED and stopped.brought == ["half-0.1", "half-0.2"]
    assert message.endswith(": 1 of 6 rungs are done; the same command goes on")
    rest = Trained()
    assert carry_out(plan, said.append, rest)[0] == EXIT_DONE and rest.brought == [*plan.rungs][1:]


def test_a_full_disk_is_said_in_a_line(home, with_validation, monkeypatch):
    plan = planned(home, with_validation)
    monkeypatch.setattr("flows.grids.laddering.Ladder.write", _full)
    with pytest.raises(InputError, match=r"ladder\.json: cannot be written: No space left on device"):
        carry_out(plan, lambda line: None, Trained())


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_without_labels_the_loss_is_forecast_and_nothing_is_said_of_accuracy(home, tmp_path):
    random, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    shares = {"train": 0.7, "validation": 0.3}
    ingest(str(folder), tmp_path / "unlabelled", IngestConfig(splits="hash", split_fractions=shares))
    plan = planned(home, str(tmp_path / "unlabelled"), recipe="pretrain_mae_debug")
    assert plan.score.name == "loss" and "without labels nothing is said of accuracy" in plan.score.words
    with pytest.raises(InputError, match="no labels, and the loss of capi is against targets of its own"):
        planned(home, str(tmp_path / "unlabelled"), recipe="pretrain_capi_debug")


FLOW = """
import sys
from pathlib import Path
from flows.services.temporary_server import prefect_server

home, data, *settings = sys.argv[1:]
with prefect_server(Path(home)):
    from flows.ladder import ladder

    state = ladder("pretrain_supervised_debug", data=data, set=settings, return_state=True)
    print(state.type.value, state.message)
"""


def _coloured(folder: Path) -> str:
    """1,200 images whose class is their colour, which a few steps learn: of rungs that guess nothing is forecast."""
    random = np.random.default_rng(0)
    for name, colour in {
        "red": (200, 40, 40),
        "green": (40, 200, 40),
        "blue": (40, 40, 200),
        "grey": (90, 90, 90),
    }.items():
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(300):
            pixels = np.clip(colour + random.normal(0, 60, (32, 32, 3)) + random.normal(0, 40, 3), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / name / f"{number}.png")
    shares = {"train": 0.6, "validation": 0.3, "test": 0.1}
    ingest(str(folder / "photos"), folder / "colours", IngestConfig(splits="hash", split_fractions=shares))
    return str(folder / "colours")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_ladder_as_a_flow_and_the_full_run_is_graded_by_it(home, tmp_path):
    data = _coloured(tmp_path)
    settings = ["epochs=2", "profile.ranks_per_node=1", "ladder.sizes=[own]", "ladder.fractions=[0.1,0.2,0.3,0.4]"]
    environment = os.environ | {"VIT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "ERROR"}

    def climbed() -> str:
        done = subprocess.run(
            [sys.executable, "-c", FLOW, str(home), data, *settings], env=environment, capture_output=True,
            text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    said = climbed()
    assert said.startswith("COMPLETED") and "4 of 4 rungs; the full run: accuracy 0." in said
    (file,) = home.glob("ladders/*/ladder.json")
    rungs = json.loads(file.read_text())["rungs"]
    for rung in rungs:
        best = json.loads((Path(rung["run"]) / "result.json").read_text())["best"]
        assert rung["value"] == best["value"] and rung["count"] > 300
    lines: list[str] = []  # by the command now: all is there
    assert ladder_command(RECIPE, [data], "local", settings, False, str(home), lines.append) == 0
    assert lines[-1] in said and all(RunDirectory(rung["run"]).last_attempt() == 1 for rung in rungs)

    done = subprocess.run(
        [sys.executable, "-m", "flows", "pretrain", RECIPE, "--data", data, "--set", "epochs=2", "--set",
         "profile.ranks_per_node=1"], env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forecast: accuracy 0." in done.stdout and ", outcome 0." in done.stdout and ", took " in done.stdout
    (result,) = home.glob("runs/pretrain_supervised_debug-????????/result.json")
    graded = json.loads(result.read_text())["forecast"]
    assert set(graded) == {"accuracy", "hours"} and 0 < graded["hours"]["outcome"] < 1
    told = json.loads((result.parent / "forecast.json").read_text())
    assert told["forecasts"]["accuracy"]["low"] == graded["accuracy"]["low"]
    assert os.stat(result.parent / "forecast.json").st_mtime < os.stat(result.parent / "job.json").st_ctime
