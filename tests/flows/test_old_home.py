"""What an earlier version wrote, today's commands open: run, checkpoint, dataset, scores, registered files, embeddings.

`tests/golden/home_1` and what comes beside it are kept for ever (tests/flows/old_home.py says how they were made).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.home import read_stack
from flows.services.stack import status
from tests.flows.old_home import GOLDEN, PLACE, RUN, with_paths

HOMES = sorted(path.name for path in GOLDEN.glob("home_*"))
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("kept", HOMES, indirect=True)]


@pytest.fixture(scope="module")
def kept(request, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("old") / "home"
    shutil.copytree(GOLDEN / request.param, home)
    with_paths(home, PLACE, str(home))
    return home


def vit(home: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    command = [sys.executable, "-m", "flows", *words]
    done = subprocess.run(
        command, env=environment | {"VIT_HOME": str(home)}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_its_dataset_is_sound_to_the_last_image(kept):
    assert "sound" in vit(kept, "check", str(kept / "data" / "digits"), "--full")


def test_its_runs_are_listed_with_their_results(kept):
    lines = {line.split()[0]: line for line in vit(kept, "runs").splitlines()}
    assert lines.keys() == {RUN, "evaluation"}
    assert " done " in lines[RUN] and "step 4" in lines[RUN] and "best validation/accuracy" in lines[RUN]


def test_its_servers_are_known_and_gone(kept):
    assert read_stack(kept)["format"] == 1
    assert [(row["alive"], row["answering"]) for row in status(kept)] == [(False, False)] * 3


def test_its_model_is_explained_with_its_evaluation(kept):
    told = json.loads(vit(kept, "explain", RUN, "--json"))
    fingerprint = json.loads((kept / "data" / "digits" / "index.json").read_text())["fingerprint"]
    assert fingerprint in json.dumps(told) and "classify-v1" in json.dumps(told)


def test_its_registered_files_are_scored_as_they_were(kept):
    model, data = str(kept / "registered-model" / "artifacts" / "hf"), str(kept / "data" / "digits")
    again = kept / "runs" / "again"
    vit(kept, "evaluate", model, "--data", data, "--protocol", "classify-v1", "--run-dir", str(again),
        "--set", "profile.ranks_per_node=1", "--set", "profile.loader_workers=0")  # fmt: skip
    scores = [json.loads((run / "result.json").read_text())["metrics"] for run in (again, kept / "runs" / "evaluation")]
    (now,), (then,) = (list(each.values()) for each in scores)
    key = "eval/classify-v1/digits.validation/top1"
    assert now[key] == then[key]


def test_its_embeddings_are_kept_and_none_is_made_again(kept):
    said = vit(kept, "embed", str(kept / "runs" / RUN), str(kept / "embeddings"), "--data",
               str(kept / "data" / "digits"), "--set", "profile.ranks_per_node=1",
               "--set", "profile.loader_workers=0")  # fmt: skip
    assert "11 images as 12 numbers each, 0 of them now" in said


def test_its_run_goes_on_from_its_checkpoint(kept):
    run = kept / "runs" / RUN
    (run / "result.json").unlink()  # as if it had been killed after step 3
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert "step 4/4" in vit(kept, "resume", RUN, "--set", "profile.ranks_per_node=1")
    samples = [line.split("\t") for line in (run / "attempts" / "02" / "samples" / "rank-00000.tsv").open()]
    assert [int(position) for _, position, _ in samples] == list(range(16, 32))
