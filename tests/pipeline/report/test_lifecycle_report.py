"""The report of a lifecycle: every stage that was reached, and how to load what was registered."""

import csv
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.report.lifecycle_report import write_lifecycle_report
from pipeline.report.record import Record, read_record
from pipeline.run_directory import read_json, write_json
from tests.pipeline.pages import Page, needs_browser, wider_than_a_phone
from tests.pipeline.registration.conftest import empty_store, store  # noqa: F401
from tests.pipeline.registration.stores import evaluated, exported, registered, right
from tests.pipeline.report.old_run import copied_home, measured_health, trained

PROTOCOL = "eval/classify-v1/digits.validation"


@pytest.fixture
def record(tmp_path) -> Record:
    """Of a lifecycle that came as far as its evaluation; fine-tuned is what was trained, beside one more model."""
    home = copied_home(tmp_path)
    run, evaluation = trained(home), home / "runs" / "evaluation"
    result = read_json(evaluation / "result.json")
    (name,) = result["metrics"]
    other = {key: value / 2 for key, value in result["metrics"][name].items()}
    difference = {"difference": -0.5, "low": -0.6, "high": -0.4, "here": 0, "there": 9, "p": 0.001, "against": name}
    result["metrics"]["scratch"], result["differences"] = other, {"scratch": {PROTOCOL: difference}}
    write_json(evaluation / "result.json", result)
    return Record(
        "birds", "/photos", str(home), f"sqlite:///{home / 'mlflow.db'}", {"profile": "local", "set": ["steps=4"]},
        [("ingest", 2.0, "3 classes"), ("fine-tune", 60.0, "loss 1.1")], str(home / "data" / "digits"),
        finetuned=str(run.path), evaluation=str(evaluation), runs=[str(run.path), str(evaluation)],
    )  # fmt: skip


def page_of(record: Record, folder) -> Page:
    *_, path = write_lifecycle_report(record, folder)
    page = Page(path.read_text())
    page.require_alone()
    return page


def test_it_holds_what_was_asked_data_curves_scores_cost_and_lineage(record, tmp_path):
    record.baselines = [{"method": "3-NN", "labels": 0.1, "accuracy": 0.5, "low": 0.4, "high": 0.6}]
    page = page_of(record, tmp_path)
    html = (tmp_path / "report.html").read_text()
    index = read_json(tmp_path / "home" / "data" / "digits" / "index.json")
    assert "steps=4" in page.text and "3 classes" in page.text and index["fingerprint"] in page.text
    assert "3-NN, 10 % of the labels" in page.text and "50.00 [40.0, 60.0]" in page.text
    assert "-50.00" in page.text and "[-60.0, -40.0]" in page.text and "0 : 9" in page.text
    assert "rank-hours" in page.text and "vit explain" in page.text and "--reproduce" in page.text
    assert "Nothing was registered." in page.text and "the lifecycle did not come so far" in page.text
    assert html.count('<figure class="curve">') >= 5 and "could not be shown" not in page.text
    assert read_record(tmp_path).finetuned == record.finetuned


def test_a_failure_stands_on_top_with_its_stage_and_reason(record, tmp_path):
    record.failure = {"stage": "register", "reason": "MLflow <gone> is away"}
    page = page_of(record, tmp_path)
    assert page.text.index("Failed at stage register") < page.text.index("What was asked")
    assert "MLflow <gone> is away" in page.text and "Done before: ingest, fine-tune." in page.text
    assert "Evaluation" in page.text and PROTOCOL.partition("/")[2].split("/")[0] in page.text


def test_one_that_failed_at_once_has_a_report_too(tmp_path):
    record = Record("birds", "/nowhere", str(tmp_path), "sqlite:///none.db")
    record.failure = {"stage": "ingest", "reason": "/nowhere: there is no such folder"}
    page = page_of(record, tmp_path / "lifecycles" / "birds")
    assert "/nowhere: there is no such folder" in page.text and "could not be shown" not in page.text


def test_a_damaged_evaluation_takes_nothing_else_along(record, tmp_path):
    write_json(tmp_path / "home" / "runs" / "evaluation" / "result.json", {"metrics": {"a": {"x": 1}}})
    page = page_of(record, tmp_path)
    assert "could not be shown" in page.text and "How it" not in page.text and "Lineage" in page.text


def test_health_and_its_bands_are_those_of_the_trainings(record, tmp_path):
    run = trained(tmp_path / "home")
    measured_health(run, {"explained_variance": [0.41, 0.2]}, (0.38, 0.45))
    page = page_of(record, tmp_path)
    assert "epoch 2: explained variance 0.2 (expected 0.38–0.45) low" in page.text
    assert "Fine-tuning, health, epoch 2: explained variance 0.2" in page.text


def test_thousands_of_hostile_classes_and_large_pictures_stay_a_small_page(record, tmp_path):
    folder = tmp_path / "home" / "runs" / "evaluation" / "scores"
    details = next(folder.glob("*/classify-v1*"))
    names = [f"<script>alert({number})</script>" for number in range(21_000)]
    with open(details / "confusion.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "predicted", "samples"))
        writer.writerows((name, names[-1 - number], 1 + number % 7) for number, name in enumerate(names))
    with open(details / "per_class.csv", "w", newline="") as file:
        csv.writer(file).writerows([("class", "samples", "top1"), *((name, 50, "0.5") for name in names)])
    noise = np.random.Generator(np.random.Philox(0)).integers(0, 256, (1400, 1400, 3), np.uint8)
    record.pictures = str(tmp_path / "pictures")
    (tmp_path / "pictures").mkdir()
    for name in ("filters.png", "attention-heads.png", "features.png"):
        Image.fromarray(noise).save(tmp_path / "pictures" / name, compress_level=0)
    page = page_of(record, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert "<script>alert(" in page.text and "not shown, this page has enough pictures" in page.text


@pytest.mark.slow
def test_every_way_to_load_works_as_it_stands_on_the_page(store, tmp_path):  # noqa: F811
    model = exported(tmp_path / "model")
    evaluation = evaluated(tmp_path / "evaluation", model, right(380))
    result = registered(store, model, "ants", evaluation)
    uri, runs = f"sqlite:///{store / 'mlflow.db'}", store / "runs" / "register-001"
    record = Record("ants", "/photos", str(store), uri, finetuned=str(model), evaluation=str(evaluation),
                    registration=str(runs))  # fmt: skip
    page = page_of(record, tmp_path / "lifecycle")
    assert "Registered as models:/ants/1" in page.text and result["summary"] in page.text
    assert (runs / "report.html").read_text() == (tmp_path / "lifecycle" / "report.html").read_text()
    snippets = [text for text in page.code if "set_tracking_uri" in text]
    assert len(snippets) == 3
    place = tmp_path / "elsewhere"
    place.mkdir()
    pixels = [random.Random(0).randrange(256) for _ in range(48 * 32 * 3)]
    Image.frombytes("RGB", (48, 32), bytes(pixels)).save(place / "photo.jpg")
    ends = ["assert probabilities.shape == (1, 3), probabilities", *["assert module.num_classes == 3"] * 2]
    code = "\n".join(f"{text}\n{end}" for text, end in zip(snippets, ends, strict=True))
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_browser
def test_no_part_of_it_is_wider_than_a_phone(record, tmp_path):
    record.failure = {"stage": "register", "reason": f"no room in /{'x' * 200}"}
    record.stages.append(("evaluate", 1.0, "y" * 150))
    *_, path = write_lifecycle_report(record, tmp_path)
    assert wider_than_a_phone(path, tmp_path) == ""
