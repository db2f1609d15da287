"""What a registration is asked with and refuses, and what Prefect is told of it."""

import json
import os
import subprocess
import sys
import time

import pytest

from flows.requests.registration import _evaluations_of, registration_run
from pipeline.errors import InputError
from pipeline.registry.locate import locate_model
from tests.pipeline.registration.stores import evaluated, exported, right

EVENTS = """
import json, os, subprocess, sys, time
from pathlib import Path
from flows.services.temporary_server import prefect_server

home, model, other = sys.argv[1:]
with prefect_server(Path(home)) as url:
    from flows.register import register
    from tests.flows.conftest import post

    state = register(model, "ants", set=["licence=CC0-1.0"], return_state=True)
    assert state.is_completed(), state
    subprocess.run([sys.executable, "-m", "flows", "register", other, "--name", "ants"], check=True)
    deadline, wanted = time.monotonic() + 60, 3
    while True:
        asked = {"filter": {"event": {"prefix": ["vit.model."]}, "order": "ASC"}}
        found = post(f"{url}/events/filter", asked)["events"]
        if len(found) >= wanted or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    print(json.dumps([[one["event"], one["resource"]["prefect.resource.id"], one["payload"]] for one in found]))
"""


@pytest.mark.slow
def test_prefect_is_told_of_registrations_and_promotions_by_flow_and_command_line(home, tmp_path):
    models = [str(exported(tmp_path / f"m{seed}", seed)) for seed in range(2)]
    environment = os.environ | {"VIT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", EVENTS, str(home), *models], env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = json.loads(done.stdout.splitlines()[-1])
    assert [(name, resource) for name, resource, _ in events] == [
        ("vit.model.registered", "vit.model.ants"),
        ("vit.model.promoted", "vit.model.ants"),
        ("vit.model.registered", "vit.model.ants"),
    ]
    assert events[1][2]["uri"] == "models:/ants/1" and events[1][2]["reason"] == "first version"
    assert events[2][2]["uri"] == "models:/ants/2" and events[2][2]["promoted"] is False
    assert events[2][2]["previous"] == "models:/ants/1"


def test_evaluations_of_the_very_checkpoint_are_found_newest_first(home, tmp_path):
    first, second = exported(tmp_path / "m1", 1), exported(tmp_path / "m2", 2)
    old, new = evaluated(home / "runs" / "scores", first, right(1)), evaluated(home / "runs" / "a", first, right(2))
    evaluated(home / "runs" / "b", second, right(3))  # another step of the same run
    os.utime(old / "result.json", (time.time() - 60,) * 2)
    assert _evaluations_of(locate_model(str(first), tracking_uri="", home=home), home) == [str(new), str(old)]


def test_an_evaluation_of_another_checkpoint_is_refused_by_name(home, tmp_path):
    ours, theirs = exported(tmp_path / "m1", 1), exported(tmp_path / "m2", 2)
    mine, other = evaluated(tmp_path / "mine", ours, right(1)), evaluated(tmp_path / "other", theirs, right(2))
    with pytest.raises(InputError) as error:
        registration_run(str(ours), "ants", home=home, overrides=[f"evaluations=[{mine}, {other}]"])
    assert str(error.value) == (
        f"{other}: an evaluation of step 2 of /elsewhere/run, not of step 1 of /elsewhere/run; leave it out, or "
        "evaluate this checkpoint"
    )
    assert not list((home / "runs").glob("register-*"))
    assert registration_run(str(ours), "ants", home=home, evaluations=[str(mine)]).plan()["source"]["lineage"]["step"]


def test_a_run_that_makes_no_model_is_refused_by_its_stage(home, tmp_path):
    run = registration_run(str(exported(tmp_path / "m")), "ants", home=home)
    with pytest.raises(InputError) as error:
        registration_run(str(run.path), "ants", home=home)
    assert str(error.value) == (f"MODEL `{run.path}`: a run of stage register makes no model; name the run that did")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("no name", [], "register: name: expected a letter or digit"),
        (
            "ants",
            ["margin=1"],
            "--set margin: no setting of a registration; there are: evaluations, licence, pr",
        ),
        ("ants", ["promotion_margin=2"], "register: promotion_margin: "),
        ("ants", ["evaluations=[/nowhere]"], "/nowhere: not a finished evaluation"),
    ],
)
def test_a_registration_that_cannot_be_is_refused_in_a_line(home, tmp_path, name, settings, words):
    with pytest.raises(InputError) as error:
        registration_run(str(exported(tmp_path / "m")), name, home=home, overrides=settings)
    assert words in str(error.value) and len(error.value.problems) == 1


def test_a_registry_that_does_not_answer_is_said_in_a_line_and_seconds(home, tmp_path):
    environment = os.environ | {"VIT_HOME": str(home), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows", "register", str(exported(tmp_path / "m")), "--name", "ants"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "MLflow server http://127.0.0.1:9 does not answer" in done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("\n") == 1 and time.monotonic() - started < 60
