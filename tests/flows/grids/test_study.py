"""Studies: a grid becomes runs, what cannot be is said, faults leave the table standing, and a small one for real."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flows.command_line.commands import study_command
from flows.command_line.runs import runs_command
from flows.control.jobs import Conclusion
from flows.grids.study_table import planned_study_lines, step_seconds
from flows.grids.studying import carry_out
from flows.requests.study import requested_study
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, InputError
from pipeline.run_directory import RunDirectory, write_json

VIT = {"name": "vit_ti16", "image_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 3}
RESNET = {"name": "timm:resnet10t", "image_size": 32, "arguments": {"channels": [8, 8, 8, 16]}}
TINY = {
    "fractions": [0.1, 1.0],
    "networks": {"ViT": {"encoder": VIT}, "ResNet": {"encoder": RESNET, "set": {"optimizer.learning_rate": 4e-3}}},
    "objectives": {"supervised": "pretrain_supervised_digits"},
    "downstream": {"protocol": "classify-v1"},
    "set": {"steps": 4, "profile.ranks_per_node": 1, "profile.loader_workers": 1},
}  # fmt: skip


@pytest.fixture
def file(tmp_path, digits):
    """Writes a study of digits, changed by some keys, and returns its path."""

    def write(**changes) -> str:
        path = tmp_path / "tiny.yaml"
        keys = {key: value for key, value in (TINY | {"data": str(digits)} | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        return str(path)

    return write


def test_a_grid_becomes_one_ordinary_run_for_each_cell(home, digits, file):
    study = requested_study(file(seeds=[0, 1], lengths=[0.5, 1.0]), overrides=[], home=home)
    assert len(study.cells) == len({study.path_of(cell) for cell in study.cells}) == 16 and not home.exists()
    small, large = study.cells[0].prepared, study.cells[-1].prepared
    assert (small.config.encoder.name, small.config.seed, small.config.steps) == ("vit_ti16", 0, 2)
    assert (large.config.encoder.name, large.config.seed, large.config.steps) == ("timm:resnet10t", 1, 4)
    assert large.config.optimizer.learning_rate == 4e-3 and small.config.optimizer.learning_rate == 2e-3
    assert small.plan["samples_per_epoch"] == pytest.approx(144, abs=5) and large.plan["samples_per_epoch"] == 1442
    lines = list(planned_study_lines(study))
    assert len(lines) == 19 and lines[-2].startswith("16 runs: ") and "petaFLOP" in lines[-2]
    assert lines[-1].startswith("hours are their arithmetic at a stated speed") and not home.exists()


def test_what_cannot_be_is_said_and_the_rest_of_the_grid_stands(home, file):
    both = {"supervised": "pretrain_supervised_digits", "mae": "pretrain_mae_digits"}
    study = requested_study(file(objectives=both, downstream={}), overrides=[], home=home)
    reasons = {(cell.network, cell.objective): cell.reason for cell in study.cells}
    assert [pair for pair, reason in reasons.items() if reason] == [("ResNet", "mae")]
    assert reasons["ResNet", "mae"] == "mae trains plain ViTs alone, and timm:resnet10t is another network"
    without_head = requested_study(file(objectives=both), overrides=[], home=home)
    assert {c.reason for c in without_head.cells if c.network == "ViT"} == {
        "", "mae gives no head, and classify-v1 scores one"
    }  # fmt: skip
    with pytest.raises(InputError, match="tiny.yaml: no cell of the study can be: mae trains plain ViTs alone"):
        requested_study(file(objectives={"mae": both["mae"]}, networks={"R": {"encoder": RESNET}}), overrides=[],
                        home=home)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "overrides", "line"),
    [
        ({"networks": {"R": "timm:resnet1t"}}, [], "networks.R with objectives.supervised: encoder: name"),
        ({"objectives": {"s": "pretrain_supervised_digit"}}, [], "did you mean `pretrain_supervised_digits`"),
        ({"objectives": {"s": "finetune_digits"}}, [], "this is a recipe of stage 'finetune', not pretrain"),
        ({"set": {"optimizer.lerning_rate": 1}}, [], "lerning_rate: no such key; did you mean `learning_rate`"),
        ({"set": {"profile.rank": 1}}, [], "profile.rank: no such key"),
        ({}, ["data=/nowhere"], "tiny.yaml: data: /nowhere: no such dataset"),
        ({"downstream": {"data": "/nowhere"}}, [], "tiny.yaml: downstream.data: /nowhere: no such dataset"),
        ({"downstream": {"recipe": "finetune_digit"}}, [], "tiny.yaml: downstream.recipe: recipe `finetune_digit`"),
        ({"downstream": {"recipe": "finetune_digits", "set": {"optimiser": 1}}}, [], "recipe: --set optimiser"),
        ({"profile": "lokal"}, [], "profile `lokal` does not exist; did you mean `local`"),
        ({"data": None}, [], "tiny.yaml: data: which images? Name a dataset directory, --set data=DATASET"),
        ({}, ["name=../x"], '--set name: not a name that can be used (got "../x"); take letters, digits'),
        ({"seeds": list(range(501))}, [], "2,004 cells, a study has 1,000 at most"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_before_anything_is_written(home, file, changes, overrides, line):
    with pytest.raises(InputError) as refused:
        requested_study(file(**changes), overrides=overrides, home=home)
    assert len(refused.value.problems) == 1 and line in refused.value.problems[0], refused.value.problems
    assert not home.exists()


def test_images_without_labels_have_no_study_of_labels(home, file, tmp_path):
    from PIL import Image

    from pipeline.config.ingest import IngestConfig
    from pipeline.ingestion.build import ingest

    for number in range(8):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (number * 9, 80, 10)).save(tmp_path / f"photos/{number}.png")
    ingest(str(tmp_path / "photos"), tmp_path / "plain", IngestConfig(splits="hash"))
    with pytest.raises(InputError, match="evaluation needs labels, and .* have none") as refused:
        requested_study(file(), overrides=[f"data={tmp_path / 'plain'}"], home=home)
    assert len(refused.value.problems) == 1


def test_a_run_that_fails_is_named_and_the_others_go_on_each_by_itself(home, file):
    study, brought, said = requested_study(file(), overrides=[], home=home), [], []
    bad = study.path_of(study.cells[2])

    def bring(run, report) -> Conclusion:
        brought.append(run.path)
        if run.path == bad or "sequence" in run.path.name:
            return Conclusion(EXIT_FAILED, "a device fell off", run, {})
        if "evaluate" in run.path.name:
            return Conclusion(EXIT_FAILED, "no scores today", run, {})
        write_json(run.result_file, {"stage": "pretrain"})
        return Conclusion(EXIT_DONE, "done", run, {})

    code, message = carry_out(study, said.append, bring)
    assert code == EXIT_FAILED and message == "study tiny: 0 of 4 cells scored"
    assert len(brought) == 1 + 4 and "sequence-tiny" in brought[0].name  # all are started, whatever came of the third
    assert any("ResNet by supervised" in line and "device fell off" in line for line in said)
    rows = json.loads((study.directory / "study.json").read_text())["rows"]
    assert [row["reason"] == "a device fell off" for row in rows] == [False, False, True, False]


def test_a_ledger_that_a_kill_has_cut_is_counted_up_to_there(tmp_path):
    run = RunDirectory(tmp_path)
    for number, text in ((1, '{"step": 1, "perf/last_step_seconds": 1.0}\n{"step": 2, "perf/la'), (2, "\0\0\0\n"),
                         (3, '{"step": 2, "perf/last_step_seconds": 2.5}\n')):  # fmt: skip
        run.attempt(number).make().ledger.write_text(text)
    assert step_seconds(run) == 3.5


def test_a_study_that_is_stopped_begins_nothing_more(home, file):
    study, brought = requested_study(file(), overrides=[], home=home), []

    def bring(run, report) -> Conclusion:
        brought.append(run.path.name)
        return Conclusion(EXIT_STOPPED, "stopped on request", run, {})

    code, message = carry_out(study, lambda line: None, bring)
    assert code == EXIT_STOPPED and message.endswith("0 of 4 cells scored; the same command goes on")
    assert len(brought) == 1


GO_ON = """
import sys
from pathlib import Path
from flows.services.temporary_server import prefect_server
with prefect_server(Path(sys.argv[1])):
    from flows.study import study
    refused = study(sys.argv[2], set=["fractions=[2]"], return_state=True)
    assert refused.is_failed() and "tiny.yaml" not in refused.message and "--set fractions" in refused.message, refused
    done = study(sys.argv[2], return_state=True)
    assert done.is_completed() and done.message == "study tiny: 4 of 4 cells scored", done
    print(done.result())
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)  # on processors that are shared
def test_a_killed_study_goes_on_as_a_flow_and_compares_two_networks_on_two_amounts_of_data(home, file):
    path = file(set=TINY["set"] | {"steps": 30}, seeds=[3])
    environment = os.environ | {"VIT_HOME": str(home), "PREFECT_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "flows", "study", path], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(home.glob("runs/pretrain_*/attempts")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([sys.executable, "-c", GO_ON, str(home), path], env=environment, capture_output=True,
                          text=True, timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split()[-1])
    assert folder == home / "studies/tiny"
    study = json.loads((folder / "study.json").read_text())
    with open(folder / "study.csv") as table:
        assert [line["state"] for line in csv.DictReader(table)] == ["done"] * 4
    for row in study["rows"]:
        run = RunDirectory(row["run"])
        assert run.last_attempt() == 1 and row["seconds"] > 0 and row["seed"] == 3  # what was killed was the watcher
        assert row["test"] == row["accuracy"] and row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        plan = run.plan()
        assert row["petaflop"] == pytest.approx(plan["training_flops_per_image"] * 30 * 64 / 1e15)
    assert len(study["points"]) == 4 and len(study["findings"]) == 1
    assert (folder / "study.svg").read_text().count("ResNet") >= 1
    listed: list[str] = []
    assert runs_command(str(home), listed.append) == 0
    assert next(line for line in listed if line.startswith("sequence-")).split()[1:5] == ["done", "4", "of", "4"]
    assert not [line for line in listed if " 0 rank-hours" in line]
    said: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in home.glob("runs/*/result.json")}
    assert study_command(path, [], False, str(home), said.append) == 0
    assert said[:2] == ["study tiny: preparing 4 cells", "study tiny: 4 runs to pretrain, 4 of them done"]
    assert said[-1].endswith("4 of 4 cells scored")
    assert before == {path: path.stat().st_mtime_ns for path in home.glob("runs/*/result.json")}
