"""From a registered version back to everything, to one image, and forward again: real runs, a registry, a clone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from tests.test_smoke import consumed, vit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SETTINGS = ("--set", "data.record=true", "--set", "profile.ranks_per_node=1", "--set", "profile.loader_workers=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        yield tmp_path_factory.mktemp("lineage") / "home"


@pytest.fixture(scope="module")
def data(home):
    vit(home, "ingest", "sklearn:digits", str(home / "data" / "digits"), "--set", "samples_per_shard=300")
    return home / "data" / "digits"


@pytest.fixture(scope="module")
def uri(home, data):
    """The registered version of a run that was fine-tuned from the middle of another."""
    runs = home / "runs"
    vit(home, "pretrain", "pretrain_mae_debug", "--data", str(data), "--run-dir", str(runs / "before"), *SETTINGS,
        "--set", "checkpoint.every_steps=12", "--set", "checkpoint.keep_every_steps=12")  # fmt: skip
    vit(home, "finetune", str(runs / "before" / "checkpoints" / "step-00000012"), "--data", str(data), "--recipe",
        "finetune_digits", "--set", "steps=4", "--run-dir", str(runs / "tuned"), *SETTINGS)  # fmt: skip
    vit(home, "evaluate", str(runs / "tuned"), "--data", str(data), "--protocol", "classify-v1",
        "--set", "profile.ranks_per_node=1")  # fmt: skip
    vit(home, "register", str(runs / "tuned"), "--name", "digits")
    return "models:/digits/1"


def test_the_trail_of_a_registered_version_names_everything(home, data, uri):
    node = json.loads(vit(home, "explain", uri, "--json"))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    above, fingerprint = node["parents"][0], read_index(data).fingerprint
    assert "champion" in node["version"]["aliases"] and node["evaluations"][0]["metrics"]
    assert node["code"]["commit"] == above["code"]["commit"] == commit
    assert node["data"][0]["fingerprint"] == above["data"][0]["fingerprint"] == fingerprint
    assert (node["run"]["stage"], above["run"]["stage"], above["weights"]["step"]) == ("finetune", "pretrain", 12)
    assert node["run"]["attempts"] == 1 and node["run"]["rank_hours"] > 0 and node["run"]["ranks"] == 1
    listed = vit(home, "models")
    assert listed.startswith(f"{uri}  candidate,champion  trained on digits ({fingerprint[:12]})")
    tree = vit(home, "explain", "tuned")
    assert f"registered   {uri}" in tree and "eval/classify-v1/digits/top1" in tree and "\nparent\n" in tree


def test_an_image_is_answered_with_the_steps_that_the_ranks_recorded(home, data, uri, tmp_path):
    read = {name: consumed(home / "runs" / name) for name in ("before", "tuned")}
    batches = {name: json.loads((home / "runs" / name / "plan.json").read_text())["batches"] for name in read}
    reader = ShardReader(read_index(data), "train")
    key = read["before"][3]  # of the first step
    (where,) = reader.places_of_key(key)
    photo = tmp_path / "photo.png"
    photo.write_bytes(reader.read(*where).image)
    answers = json.loads(vit(home, "explain", uri, "--contains", str(photo), "--json"))["answers"]
    for answer, name, steps in zip(answers, ("tuned", "before"), (4, 12), strict=True):
        batch = batches[name]["global_batch_size"]
        expected = [position // batch + 1 for position, met in sorted(read[name].items()) if met == key]
        (match,) = [match for match in answer["matches"] if match["key"] == key]
        assert match["steps"] == [step for step in expected if step <= steps]
        assert answer["answer"] == ("yes" if match["steps"] else "no")
    assert answers[1]["answer"] == "yes"


def test_the_script_trains_the_model_again_to_the_same_bits_from_a_clone(home, data, uri, tmp_path):
    script, clone, tools = tmp_path / "reproduce.sh", tmp_path / "clone", tmp_path / "bin"
    script.write_text(vit(home, "explain", uri, "--reproduce"))
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    tools.mkdir()  # the environment of this test stands for the one that `uv sync` would make
    (tools / "uv").write_text(
        f'#!/bin/sh\n[ "$1" = run ] || exit 0\nshift 2\nPYTHONPATH="$PWD" exec {sys.executable} -m flows "$@"\n'
    )
    (tools / "uv").chmod(0o755)
    environment = os.environ | {
        "VIT_HOME": str(tmp_path / "home"), "PATH": f"{tools}:{os.environ['PATH']}", "DATA_1": str(tmp_path / "fresh"),
    }  # fmt: skip
    done = subprocess.run(["sh", str(script)], cwd=clone, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "fresh" / "index.json").read_bytes() == (data / "index.json").read_bytes()  # ingested anew
    for name, again, step in (("before", "1-pretrain", 12), ("tuned", "2-finetune", 4)):
        theirs, ours = (
            [json.loads(line) for line in (run / "attempts/01/metrics.jsonl").read_text().splitlines()]
            for run in (home / "runs" / name, clone / "reproduced" / again)
        )
        assert [line["train/loss"] for line in ours[:step]] == [line["train/loss"] for line in theirs[:step]]


def test_what_is_taken_down_names_its_descendants_and_is_not_read_again(home, data, uri):
    key = consumed(home / "runs" / "before")[3]
    before = home / "runs" / "before"
    told = vit(home, "takedown", str(data), key, "--reason", "its writer asked")
    for model in (uri, str(before), str(home / "runs" / "tuned")):
        assert any(line.startswith(f"{model}: ") and "steps 1" in line for line in told.splitlines()), told
    assert "on its tombstone list: 1 samples" in vit(home, "check", str(data))
    assert "did you mean" in vit(home, "takedown", str(data), key + "x", "--reason", "a slip", code=2)
    vit(home, "pretrain", "pretrain_mae_debug", "--data", str(data), "--run-dir", str(home / "runs" / "later"),
        *SETTINGS)  # fmt: skip
    earlier, later = consumed(before), consumed(home / "runs" / "later")
    changed = [position for position in later if earlier[position] != later[position]]
    assert key not in later.values() and changed == [p for p in sorted(earlier) if earlier[p] == key]


def test_wrong_input_is_a_line_and_exit_2(home, data, uri, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("no image")
    assert "holds no image" in vit(home, "explain", uri, "--contains", str(text), code=2)
    assert "leave out --json" in vit(home, "explain", uri, "--reproduce", "--json", code=2)
    assert "not registered" in vit(home, "explain", "models:/digits/77", code=2)
    assert "--reason" in vit(home, "takedown", str(data), "key", "--reason", " ", code=2)
