"""The report of a training: everything that is on disk, alone on a page, however the run ended."""

import json
import subprocess
import sys
import time

import pytest

from pipeline.report.charts import Line, line_chart
from pipeline.report.ledger import PARSED, POINTS, Curve, read_story
from pipeline.report.run_report import write_run_report
from pipeline.report.training_sections import hours_in_words
from pipeline.run_directory import RunDirectory, read_json, write_json
from tests.pipeline.pages import Page, needs_browser, wider_than_a_phone
from tests.pipeline.report.old_run import copied_home, long_ledger, measured_health, trained


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return trained(copied_home(tmp_path))


def page_of(run: RunDirectory) -> Page:
    page = Page(write_run_report(run).read_text())
    page.require_alone()
    return page


def test_a_finished_run_says_what_was_asked_how_it_learned_and_what_it_cost(run):
    page = page_of(run)
    provenance, plan = read_json(run.provenance_file), run.plan()
    assert "--set encoder.image_size=16" in page.text and "vit_ti16" in page.text
    assert "4 of 4" in page.text and "Best by validation: validation/accuracy 1.0000 at step 4" in page.text
    assert plan["data"]["fingerprint"] in page.text and provenance["code"]["commit"] in page.text
    beat = read_json(run.attempt(1).heartbeat(0))
    assert f"{2 * (beat['time'] - beat['started']) / 3600:.3g} (" in page.text
    assert "Health" in page.text and "not measured: the run kept no health.jsonl" in page.text
    html = (run.path / "report.html").read_text()
    assert html.count('<figure class="curve">') >= 5 and "validation: 1.094 at step 2, 1.091 at step 4" in html
    assert "could not be shown" not in page.text


def test_health_that_was_switched_off_is_said_to_be(run):
    with open(run.config_file, "a") as file:
        file.write("health: {every_steps: 0}\n")
    assert "not measured: off: health.every_steps is 0" in page_of(run).text
    write_json(run.plan_file, run.plan() | {"health_asked": None})  # nobody set it: the run is short
    assert "not measured: off: a run of 4 steps is too short for it; --set health.every_steps=1" in page_of(run).text


def test_health_is_drawn_before_its_band_and_said_in_words(run):
    measured_health(run, {"explained_variance": [0.2, 0.41, 0.42], "rankme": [0.4, 0.4]}, (0.38, 0.45))
    page = page_of(run)
    assert "epoch 2: explained variance 0.41 (expected 0.38–0.45) ok" in page.text
    assert "4 of 5 measurements with a band were inside it. Bands: the recipe's own run." in page.text
    assert (run.path / "report.html").read_text().count('class="band"') == 2
    assert "with a look at its health" not in page.text  # it was low once, and is not any more


def test_a_run_whose_newest_verdict_is_outside_does_not_look_well(run):
    measured_health(run, {"explained_variance": [0.41, 0.2]}, (0.38, 0.45))
    page = page_of(run)
    assert "Done, with a look at its health" in page.text
    assert page.text.index("Health, epoch 2: explained variance 0.2 (expected") < page.text.index("What was asked")


def test_neighbours_below_their_band_alone_are_no_bad_health(run):
    measured_health(run, {"knn_top1": [0.41, 0.2]}, (0.38, 0.45))
    page = page_of(run)
    assert "with a look at its health" not in page.text and "knn top1 0.2 (expected 0.38–0.45) low" in page.text


def test_a_value_that_is_no_number_is_the_worst_of_all(run):
    measured_health(run, {"rankme": [0.4]}, (0.38, 0.45))
    file = run.attempt(1).path / "health.jsonl"
    one, alarm = json.loads(file.read_text()), {"metric": "feature_spread", "basis": "alarm: not a number"}
    alarm |= {"value": None, "low": None, "high": None, "verdict": "low", "words": "epoch 1: nan"}
    file.write_text(json.dumps(one) + "\n" + json.dumps(one | alarm) + "\n")
    page = page_of(run)
    assert "Done, with a look at its health" in page.text and "Health, epoch 1: nan" in page.text
    assert "never a finite number" in page.text and "could not be shown" not in page.text


def test_measurements_without_a_band_are_shown_and_not_judged(run):
    line = {
        "step": 4,
        "progress": 1.0,
        "metric": "rankme",
        "value": 31.5,
        "verdict": "no band",
        "words": "epoch 1: RankMe 31.5",
    }
    (run.attempt(1).path / "health.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "metric": "ra')
    page = page_of(run)
    assert "31.5" in page.text and "shown, not judged" in page.text
    assert "There was no band" in page.text and page.text.count("no band") == 1  # and no columns for it


def test_a_metric_without_a_band_says_so_once_beside_one_that_has_one(run):
    measured_health(run, {"explained_variance": [0.41, 0.42]}, (0.38, 0.45))
    log = run.attempt(1).path / "health.jsonl"
    line = json.loads(log.read_text().splitlines()[-1]) | {"metric": "rankme", "value": 31.5, "low": None, "high": None}
    line |= {"basis": "", "verdict": "no band", "words": "epoch 1: RankMe 31.5"}
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")
    text = page_of(run).text
    assert text.count("no band") == 1 and "0 of 2 times" in text and "0 of 1 times" not in text


def test_fewer_than_three_points_are_not_joined():
    def drawn(count: int) -> str:
        steps = [float(step) for step in range(count)]
        return line_chart("RankMe", [Line("measured", Curve(steps, steps, steps, steps, steps[-1]))])

    assert 'class="line one"' not in drawn(2) and drawn(2).count("<circle") == 2
    assert 'class="line one"' in drawn(3) and drawn(3).count("<circle") == 3


@pytest.mark.parametrize(
    ("hours", "words"),
    [(0.0, "0"), (0.004, "less than 0.01"), (0.0544, "0.0544"), (0.997, "1.00"), (1234.567, "1,234.57")],
)
def test_hours_are_told_to_a_hundredth_and_less_than_one_finer(hours, words):
    assert hours_in_words(hours) == words


def test_a_forecast_stands_beside_its_outcome(run):
    said = {"value": 0.9, "low": 0.85, "high": 0.95, "unit": "share", "metric": "knn_top1"}
    hours = {"value": 2.0, "low": 1.0, "high": 3.0, "unit": "hours"}
    forecast = {"format_version": 1, "basis": "3 runs of a ladder", "forecasts": {"accuracy": said, "hours": hours}}
    write_json(run.path / "forecast.json", forecast)
    result = read_json(run.result_file)
    graded = {"accuracy": said | {"outcome": 0.91, "inside": True}, "hours": hours | {"outcome": 4.0, "inside": False}}
    write_json(run.result_file, result | {"forecast": graded})
    page = page_of(run)
    text = " ".join(page.text.split())
    assert "accuracy (knn_top1)90.0 %85.0 % – 95.0 %91.0 %inside" in text and "hours2 h1 h – 3 h4 houtside" in text
    assert "Rests on: 3 runs of a ladder." in text


def test_the_price_is_of_machines_where_there_are_no_accelerators(run):
    run.profile_file.write_text(run.profile_file.read_text().replace("price_per_device_hour: 0.0", ""))
    with open(run.profile_file, "a") as file:
        file.write("price_per_device_hour: 100.0\n")
    beat = read_json(run.attempt(1).heartbeat(0))
    price = 100 * (beat["time"] - beat["started"]) / 3600  # two ranks on one machine
    assert f"price by the profile{price:,.2f}" in page_of(run).text


@pytest.mark.parametrize(
    ("code", "ending", "kind"), [(1, "Failed", "look"), (75, "Stopped on request", "sound"), (76, "Failed", "look")]
)
def test_a_run_that_has_not_ended_well_says_so_first_and_how_to_go_on(run, code, ending, kind):
    run.result_file.unlink()
    write_json(run.attempt(1).path / "exit" / "verdict.json", {"code": code, "reason": "disk <full>", "node": None})
    page = page_of(run)
    assert page.text.index(ending) < page.text.index("What was asked")
    assert "It came to step 4 of 4: disk <full>" in page.text and f"vit resume {run.path}" in page.text
    assert f'<section class="verdict {kind}">' in (run.path / "report.html").read_text()


def test_what_is_damaged_takes_nothing_else_along(run):
    (run.path / "bands.json").write_text('{"metrics": {"rankme": [[0, 1')
    (run.path / "forecast.json").write_text("[")
    (run.path / "reconstructions.png").write_bytes(b"no picture")
    with open(run.attempt(1).ledger, "a") as file:
        file.write('{"step": 5, "train/lo')
    page = page_of(run)
    assert "could not be shown" in page.text and "forecast.json: damaged" in page.text
    assert "not shown, reconstructions.png cannot be read" in page.text
    assert "Best by validation" in page.text and "4 of 4" in page.text


def test_names_with_markup_are_text(run, tmp_path):
    name = "<script>alert(1)</script> \"'&"
    moved = run.path.rename(run.path.parent / name.replace("/", ""))
    provenance = read_json(moved / "provenance.json")
    write_json(moved / "provenance.json", provenance | {"host": name, "command": ["vit", name], "parent": name})
    plan = read_json(moved / "plan.json")
    write_json(moved / "plan.json", plan | {"notes": [name], "data": plan["data"] | {"name": name}})
    page = page_of(RunDirectory(moved))
    assert page.text.count("<script>alert(1)") >= 5


def test_steps_that_were_done_again_count_as_the_later_attempt_did_them(run):
    for number, (first, last, loss) in enumerate([(1, 6, 3.0), (4, 8, 1.0)], 1):
        ledger = run.attempt(number).make().ledger
        ledger.write_text("".join(json.dumps({"step": s, "train/loss": loss}) + "\n" for s in range(first, last + 1)))
    curve = read_story(run).curves["train/loss"]
    assert curve.steps == [1, 2, 3, 4, 5, 6, 7, 8] and curve.means == [3.0] * 3 + [1.0] * 5


def test_a_ledger_that_is_thinned_keeps_every_validation_and_its_last_step(run):
    long_ledger(run.attempt(1).ledger, 3 * PARSED)
    story = read_story(run)
    assert story.thinned and story.last_step == 3 * PARSED and story.skipped == 1
    assert story.curves["validation/loss"].means == pytest.approx([number / 10 for number in range(1, 11)])
    loss = story.curves["train/loss"]
    assert len(loss.steps) <= POINTS and loss.steps[-1] == 3 * PARSED
    assert loss.last == json.loads(run.attempt(1).ledger.read_text().splitlines()[-1])["train/loss"]
    assert all(low <= mean <= high for mean, low, high in zip(loss.means, loss.lows, loss.highs, strict=True))


@pytest.mark.slow
def test_a_million_steps_are_read_in_seconds(run):
    long_ledger(run.attempt(1).ledger, 1_000_000)
    started = time.process_time()
    size = write_run_report(run).stat().st_size
    assert time.process_time() - started < 5 and size < 1_000_000
    assert "1,000,000 of 4" in (run.path / "report.html").read_text()


def test_a_report_is_written_without_torch(run):
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.run_directory import RunDirectory\n"
        "from pipeline.report.run_report import write_run_report\nimport pipeline.report.lifecycle_report\n"
        f"write_run_report(RunDirectory({str(run.path)!r}))\n"
        "heavy = {'torch', 'mlflow', 'prefect', 'matplotlib'} & sys.modules.keys()\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_browser
def test_no_part_of_the_page_is_wider_than_a_phone(run, tmp_path):
    measured_health(run, {"explained_variance": [0.41, 0.2]}, (0.38, 0.45))
    assert wider_than_a_phone(write_run_report(run), tmp_path) == ""
