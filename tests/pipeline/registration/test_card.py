"""The model card says what is known of a model, and nothing else."""

import time

import pytest

from pipeline.checkpoints.files import FROZEN_FILE
from pipeline.forecast.grading import planned
from pipeline.registration.card import Facts, model_card
from pipeline.registration.training_facts import forecast_facts, training_facts
from pipeline.registry.locate import ModelSource, locate_model
from pipeline.run_directory import RunDirectory, write_json
from tests.flows.test_flows import prepared
from tests.pipeline.registration.stores import FINGERPRINT, evaluated, exported, registered, right


def trained(home, digits, *settings) -> ModelSource:
    """A run that was prepared as a person prepares it, with the records of two attempts and a checkpoint."""
    run = prepared(home, digits, *settings)
    for number, seconds in ((1, 3600), (2, 1800)):
        attempt = run.attempt(number).make()
        now = time.time()
        beat = {"time": now, "started": now - seconds, "host": "node7", "ranks": {"0": 1, "1": 2}}
        write_json(attempt.heartbeat(0), beat)
    checkpoint = run.checkpoints / "step-00000004"
    checkpoint.mkdir()
    (checkpoint / FROZEN_FILE).write_bytes(b"x")
    write_json(checkpoint / "manifest.json", {"step": 4, "files": {FROZEN_FILE: {"bytes": 1}}})
    return locate_model(str(run.path), tracking_uri="", home=home)


def test_the_card_of_a_trained_model_names_data_recipe_compute_and_limits(home, digits):
    source = trained(home, digits)
    plan = RunDirectory(source.lineage["run"]).plan()
    card = model_card(source, Facts(training=training_facts(source), uri="models:/x/3", licence="CC-BY-4.0"))
    assert (
        "`digits`: images per split: train 1,442, test 355; fingerprint" in card and plan["data"]["fingerprint"] in card
    )
    assert f"4 of {plan['steps']['steps']:,} steps of" in card and "| parent | none, from random weights |" in card
    assert "| attempts | 2 |" in card and "hours of ranks (processes without accelerator) | 3 |" in card
    assert "## Licence\n\nCC-BY-4.0" in card and "Not scored on any data" in card
    assert 'mlflow.pyfunc.load_model("models:/x/3")' in card and '"local-dir:" + path + "/artifacts/hf"' in card


def test_a_dataset_that_is_gone_or_has_changed_is_not_described(home, digits, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    (copy / "certificate.json").write_text("{}")
    source = trained(home, copy)
    assert "  - certificate: sha256 `44136fa355b3678a" in model_card(source, Facts(training=training_facts(source)))
    shutil.rmtree(copy)
    card = model_card(source, Facts(training=training_facts(source)))
    assert "images per split: counts not known" in card and "certificate" not in card


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {},
            [
                "It knows the classes above and no others; the probabilities are of these classes alone",
                "- classes: a, b",
            ],
        ),
        ({"outputs": "sigmoid"}, ["each class gets a probability of its own"]),
        ({"num_classes": 0}, ["no head: it gives pooled features", "features = model.predict", "name nothing"]),
        ({"image_size": [32, 48]}, ["32 x 48 (height x width) pixels"]),
    ],
)
def test_what_it_gives_and_where_it_ends_is_said(tmp_path, settings, words):
    source = locate_model(str(exported(tmp_path / "m", **settings)), tracking_uri="", home=tmp_path)
    card = model_card(source, Facts())
    for one in words:
        assert one in card, card
    assert "None recorded: it was not evaluated before it was registered." in card
    assert "Not stated by whoever registered it." in card and FINGERPRINT in card


def test_results_stand_in_the_card_with_their_intervals_and_how_often_the_test_split_was_read(store, tmp_path):
    import mlflow

    model = exported(tmp_path / "m")
    registered(store, model, "ants", evaluated(tmp_path / "e", model, right(300)), licence="MIT")
    client = mlflow.MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    version = client.get_model_version("ants", "1")
    assert "| eval/classify-v1/ants/top1 | 0.7500 | 0.7400 – 0.7600 |" in version.description
    assert "was read to score these weights, by then: classify-v1/ants 1x." in version.description
    assert "Scored on `ants.validation`, `ants` alone" in version.description and "MIT" in version.description
    note = client.get_logged_model(version.source.removeprefix("models:/")).tags["mlflow.note.content"]
    assert note == version.description and 'load_model("models:/ants/1")' in note


def test_a_version_carries_what_was_forecast_beside_what_came(home, digits):
    source = trained(home, digits)
    assert forecast_facts(source, {}, {}) == {} and "## Forecast" not in model_card(source, Facts())
    run = RunDirectory(source.lineage["run"])
    linear = "eval/linear-cached-v1/digits.validation/top1"
    accuracy = {"value": 0.75, "low": 0.7, "high": 0.8, "unit": "share", "metric": linear}
    fingerprint = run.plan()["data"]["fingerprint"]
    forecasts = {"accuracy": accuracy, "hours": {"value": 1.0, "low": 0.5, "high": 1.2, "unit": "hours"}}
    write_json(run.plan_file, run.plan() | {"steps": {"steps": 4, "samples": 64}})
    said = {"format_version": 1, "basis": "x", "forecasts": forecasts} | planned(run.plan())
    write_json(run.path / "forecast.json", said)
    hours = {"value": 1.0, "low": 0.5, "high": 1.2, "outcome": 1.5, "inside": False}
    write_json(run.result_file, {"stage": "pretrain", "steps": 4, "forecast": {"hours": hours}})
    scored = {"digits.validation": {"fingerprint": fingerprint, "split": "validation", "count": 300}}
    facts = forecast_facts(source, {linear: 0.78}, scored)
    assert facts["accuracy"]["outcome"] == 0.78 and facts["accuracy"]["inside"] and facts["hours"] == hours
    card = model_card(source, Facts(forecast=facts))
    assert "| accuracy | 0.75 | 0.7 – 0.8 | 0.78 | inside |" in card
    assert "| hours | 1 | 0.5 – 1.2 | 1.5 | outside |" in card
    write_json(run.path / "forecast.json", said | {"steps": 2})  # and was made longer afterwards
    assert forecast_facts(source, {linear: 0.78}, scored) == {}
    write_json(run.path / "forecast.json", said)
    unknown = forecast_facts(source, {}, {})  # it is registered before it was evaluated
    assert "outcome" not in unknown["accuracy"]
    assert "| accuracy | 0.75 | 0.7 – 0.8 | not known |  |" in model_card(source, Facts(forecast=unknown))
