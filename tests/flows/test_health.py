"""Health of real runs as people see it: reference bands written before the start, MLflow, Prefect, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.requests.training import training_run
from pipeline.config.recipe import RECIPES
from pipeline.errors import InputError
from pipeline.health.bands import read_bands
from pipeline.preparation.bands import REFERENCES
from pipeline.run_directory import RunDirectory

MEASURED = sorted(path.stem for path in REFERENCES.glob("*.json"))


def prepared(home: Path, data: Path, recipe: str, *settings: str, run_dir: Path | None = None) -> RunDirectory:
    return training_run(
        "pretrain", recipe, data=[str(data)], profile="local", overrides=settings, run_dir=run_dir and str(run_dir),
        home=home,
    )  # fmt: skip


def test_reference_curves_are_of_recipes_that_are_there():
    assert MEASURED and all((RECIPES / f"{name}.yaml").is_file() for name in MEASURED)


@pytest.mark.parametrize("name", MEASURED)
def test_a_reference_holds_for_the_recipe_as_it_is_now(name, home, digits):
    """A recipe or a default that changed is another experiment: measure it anew by tests.benchmarks.bands."""
    bands = read_bands(prepared(home, digits, name, "seed=7", "health.every_steps=5", "zero.stage=0").path)
    assert bands is not None and bands.basis == f"{name} on digits, 5 seeds"
    for metric, points in bands.metrics.items():
        assert points[-1][0] == 1.0 and bands.at(metric, 0.5) is not None, metric


def test_other_settings_other_data_and_a_rehearsal_have_no_reference_and_bands_of_others_stay(home, digits, tmp_path):
    from tests.pipeline.pictures import small_dataset

    name = "pretrain_mae_debug"
    for number, setting in enumerate(["steps=21", "encoder.depth=3", "objective.mask_ratio=0.5", "ema_decay=0.9"]):
        assert read_bands(prepared(home, digits, name, setting).path) is None, number
    small_dataset(tmp_path)
    assert read_bands(prepared(home, tmp_path / "dataset", name).path) is None
    run = prepared(home, digits, name, run_dir=tmp_path / "run")
    assert read_bands(run.path).basis.startswith(name)
    prepared(home, digits, name, "steps=21", run_dir=tmp_path / "run")
    assert read_bands(run.path) is None
    content = {"format_version": 1, "basis": "a ladder", "metrics": {"rankme": [[0, 1, 2]]}}
    (run.path / "bands.json").write_text(json.dumps(content))
    prepared(home, digits, name, "steps=21", run_dir=tmp_path / "run")
    assert read_bands(run.path).basis == "a ladder"


def test_a_cadence_left_open_costs_at_most_two_images_of_a_hundred(home, digits):
    from pipeline.config.stages import read_run_config

    health = read_run_config(prepared(home, digits, "pretrain_mae_digits").path).health
    assert (health.images, health.every_steps) == (4 * 96, 150)
    assert 384 * (1200 / health.every_steps) <= 0.02 * 1200 * 128
    short = prepared(home, digits, "pretrain_mae_debug", "health.every_steps=null")
    assert read_run_config(short.path).health.every_steps == 0


@pytest.mark.parametrize("policy", ["stop", "escalate"])
def test_a_policy_that_acts_makes_the_cadence_dense_enough_or_is_refused(policy, home, digits):
    from pipeline.config.stages import read_run_config

    def of(*settings: str):
        asked = [f"health.policy={policy}", "health.every_steps=null", "steps=20", *settings]
        run = prepared(home, digits, "pretrain_mae_debug", *asked)
        return read_run_config(run.path).health

    for settings, every in (([], 6), (["health.patience=5"], 3), (["health.settling=0.9", "health.patience=2"], 1)):
        health = of(*settings)
        due = [step for step in range(1, 21) if step % health.every_steps == 0 or step == 20]
        assert health.every_steps == every
        assert sum(step / 20 >= health.settling for step in due) >= health.patience
    for settings, words in (
        (["health.every_steps=0"], "health.every_steps: 0 leaves 0 measurements"),
        (["health.every_steps=15"], "leaves 2 measurements behind health.settling (0.1 of 20 steps), and"),
        (["health.patience=50"], "it never would; set health.patience to 1, or make the run longer"),
    ):
        with pytest.raises(InputError) as refused:
            of(*settings)
        assert words in str(refused.value) and f"health.policy {policy}" in str(refused.value)
        assert len(refused.value.problems) == 1
    assert of("health.every_steps=10", "health.patience=2").every_steps == 10


def test_a_controller_that_is_started_again_calls_for_help_only_of_another_row(home, digits):
    from flows.orchestration.health import HealthWatch
    from pipeline.config.health import HealthConfig
    from pipeline.health.log import write_verdicts
    from pipeline.health.verdicts import Moment, Value, judge

    run = prepared(home, digits, "pretrain_mae_debug", "steps=100", "health.policy=escalate", "health.patience=2")

    def called(attempt: int, *measured: tuple[int, float]) -> bool:
        """Whether a controller that is new calls, once these (step, spread) are measured."""
        for step, spread in measured:
            verdict = judge(Value("feature_spread", spread), Moment(step, step, 2.0, 0.8), None, HealthConfig())
            write_verdicts(run.attempt(attempt).make(), [verdict])
        watch = HealthWatch(run)
        measurements = watch.fresh()
        if calls := watch.call_for_help(measurements) is not None:
            watch.called(measurements)
        return calls

    assert not called(1, (10, 0.0)) and called(1, (20, 0.0))
    assert not called(1) and not called(1, (30, 0.0))
    assert not called(1, (40, 0.5), (50, 0.0)) and called(1, (60, 0.0))
    assert called(2, (10, 0.0), (20, 0.0))  # resumed from before, and as bad again
    (run.path / "escalated.json").write_text("{")
    assert called(2) and not called(2)


FLOWS = """
import json, sys, time
from pathlib import Path
from flows.services.temporary_server import prefect_server

home, data = sys.argv[1:]
with prefect_server(Path(home)) as url:
    from flows.pretrain import pretrain
    from prefect.client.orchestration import get_client
    from tests.flows.conftest import post

    # No features have a spread of 2: an alarm in each measurement.
    alarmed = ["health.every_steps=10", "health.least_spread=2", "health.patience=2", "health.images=64",
               "checkpoint.every_steps=1000"]
    asked = {"encoder": "debug", "objective": "mae", "data": data}
    escalated = pretrain(**asked, set=[*alarmed, "steps=500", "health.policy=escalate"], return_state=True)
    assert escalated.is_completed(), escalated
    stopped = pretrain(**asked, set=[*alarmed, "steps=100", "health.policy=stop"], return_state=True)
    with get_client(sync_client=True) as client:
        runs = sorted(client.read_flow_runs(), key=lambda one: one.created)
        said = [state.message for state in client.read_flow_run_states(runs[0].id)]
        artifacts = {one.key: one.description for one in client.read_artifacts()}
    deadline = time.monotonic() + 60
    while True:
        events = post(f"{url}/events/filter", {"filter": {"event": {"name": ["vit.health"]}}})["events"]
        if events or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    told = [[one["payload"]["words"], one["related"][0]["prefect.resource.id"]] for one in events]
    print(json.dumps({"run": escalated.result(), "messages": said, "flow_run": str(runs[0].id), "events": told,
                      "artifacts": artifacts, "stopped": [stopped.type.value, stopped.message]}))
"""


@pytest.mark.slow
def test_an_escalation_reaches_prefect_and_the_run_goes_on_and_a_stop_fails_with_a_checkpoint(home, digits):
    environment = os.environ | {"VIT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", FLOWS, str(home), str(digits)], env=environment, capture_output=True, text=True,
        timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    alarm = "health was bad 2 times in a row: "
    assert any(message and "feature spread" in message for message in found["messages"]), found["messages"]
    assert found["events"] and all(words.startswith("health was bad") for words, _ in found["events"])
    assert found["events"][0][1] == f"prefect.flow-run.{found['flow_run']}"
    assert any(key.startswith("health-") and "explained variance" in said for key, said in found["artifacts"].items())
    kind, message = found["stopped"]
    assert kind == "FAILED" and alarm in message and "feature spread" in message and "vit resume" in message
    _is_in_mlflow(RunDirectory(found["run"]), home)


def _is_in_mlflow(run: RunDirectory, home: Path) -> None:
    from pipeline.registry.tracking import connect, find_mirrored_run

    uri = f"sqlite:///{home / 'mlflow.db'}"
    _, run_id = find_mirrored_run(run, uri)
    client = connect(uri)
    verdicts = [json.loads(line) for line in (run.attempt(1).path / "health.jsonl").read_text().splitlines()]
    for metric in ("explained_variance", "rankme", "feature_spread", "attention_entropy"):
        points = {one.step: one.value for one in client.get_metric_history(run_id, f"health/{metric}")}
        assert points == {one["step"]: one["value"] for one in verdicts if one["metric"] == metric}
