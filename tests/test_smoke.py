"""The main path on real parts through the command line: pretrain, stop, resume, fine-tune, evaluate, register."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.inspection.artifacts import log_pictures
from pipeline.registry.locate import locate_model
from pipeline.run_directory import RunDirectory

pytestmark = pytest.mark.slow


def start(home: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"VIT_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def vit(home: Path, *arguments: str, code: int = 0) -> str:
    process = start(home, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    assert "Traceback" not in output
    return output


def consumed(run: Path) -> dict[int, str]:
    """Key of the sample at each position, over all attempts."""
    keys: dict[int, str] = {}
    for path in sorted(run.glob("attempts/*/samples/rank-*.tsv")):
        for line in path.read_text().splitlines():
            _, position, key = line.split("\t")
            assert keys.setdefault(int(position), key) == key
    return keys


def weights(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    newest = RunDirectory(run).newest_checkpoint()
    return {k: v for name in newest.manifest["files"] for k, v in load_file(newest.directory / name).items()}


def wait_for_checkpoint(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists():
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def module_home(tmp_path_factory, module_monkeypatch):
    return tmp_path_factory.mktemp("smoke") / "home"


@pytest.fixture(scope="module")
def module_monkeypatch():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        yield patch


@pytest.fixture(scope="module")
def pretrained(module_home, digits):
    run = module_home / "runs" / "pretrained"
    vit(module_home, "pretrain", "pretrain_mae_debug", "--data", str(digits), "--run-dir", str(run))
    return run


def test_pretraining_leaves_a_result_a_ledger_and_a_picture(pretrained):
    result = json.loads((pretrained / "result.json").read_text())
    assert result["steps"] == 20 and not result["rehearsal"]
    ledger = [json.loads(line) for line in (pretrained / "attempts/01/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in ledger] == list(range(1, 21))
    assert ledger[-1]["train/loss"] < ledger[0]["train/loss"]
    assert (pretrained / "reconstructions.png").stat().st_size > 1000
    assert json.loads((pretrained / "deepspeed.json").read_text())["gradient_clipping"] == 0.0


def test_the_ledger_is_in_mlflow_with_every_step_once(pretrained, module_home):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{module_home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("vit/pretrain")
    (found,) = client.search_runs([experiment.experiment_id], f"tags.`vit.run_key` = '{RunDirectory(pretrained).key}'")
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, 21))
    assert found.info.status == "FINISHED" and found.data.params["objective.kind"] == "mae"


def test_the_model_is_fine_tuned_evaluated_registered_and_pulled(pretrained, module_home, digits):
    tuned = module_home / "runs" / "tuned"
    output = vit(module_home, "finetune", str(pretrained), "--data", str(digits), "--recipe", "finetune_digits",
                 "--set", "steps=4", "--run-dir", str(tuned))  # fmt: skip
    assert "warm-up shortened" in output and "optimizer   adamw" in output and ": making the model" in output
    log = (tuned / "attempts/01/log/rank-00000.log").read_text()
    assert "tensors loaded; 2 missing (fc_norm.weight, fc_norm.bias)" in log
    output = vit(module_home, "evaluate", str(tuned), "--data", str(digits), "--set", "profile.ranks_per_node=2")
    assert "eval/linear-cached-v1/digits/top1" in output and re.search(r"digits/count +355\b", output)
    output = vit(module_home, "register", str(tuned), "--name", "smoke")
    assert "models:/smoke/1 is champion: first version" in output
    output = vit(module_home, "register", str(tuned), "--name", "smoke")
    assert "models:/smoke/1 already is this checkpoint with these weights and these evaluations" in output
    output = vit(module_home, "evaluate", "models:/smoke@champion", "--data", str(digits), "--protocol", "classify-v1",
                 "--set", "profile.ranks_per_node=1")  # fmt: skip
    assert "eval/classify-v1/digits/top1" in output
    _assert_pictures_of_the_champion_go_to_the_run_that_registered_it(module_home, tuned)
    _assert_three_ways_of_loading_agree(module_home)


def _assert_pictures_of_the_champion_go_to_the_run_that_registered_it(home: Path, tuned: Path) -> None:
    import mlflow

    uri = f"sqlite:///{home / 'mlflow.db'}"
    champion = locate_model("models:/smoke@champion", tracking_uri=uri, home=home)
    words = log_pictures([tuned / "plan.json"], champion, uri)
    run = mlflow.MlflowClient(uri).get_model_version_by_alias("smoke", "champion").run_id
    assert words == f"in MLflow: run {run}, artifacts inspection/step-00000004"
    assert [one.path for one in mlflow.MlflowClient(uri).list_artifacts(run, "inspection/step-00000004")]


def test_what_a_run_learned_is_drawn_and_lies_beside_it_in_mlflow(pretrained, module_home, digits, tmp_path):
    import mlflow
    from PIL import Image

    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 2:5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    output = vit(module_home, "inspect", str(pretrained), str(digits), str(tmp_path / "pictures"),
                 "--set", f"mask={tmp_path / 'mask.png'}", "--set", "images=3")  # fmt: skip
    assert "8 of 8: filled-in.png" in output and "8 pictures: " in output
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    run = re.search(r"in MLflow: run (\w+), artifacts (\S+)", output)
    artifacts = mlflow.MlflowClient(f"sqlite:///{module_home / 'mlflow.db'}").list_artifacts(run[1], run[2])
    assert run[2] == "inspection/step-00000020" and {Path(one.path).name for one in artifacts} == drawn
    output = vit(module_home, "inspect", str(pretrained), str(digits), str(digits), code=2)
    assert output.count("\n") == 1 and "not empty" in output


def _assert_three_ways_of_loading_agree(home: Path) -> None:
    """In a process that cannot import this project, and with pickle forbidden."""
    code = """
import sys, mlflow, numpy as np, timm, torch
from PIL import Image
sys.modules.update(dict.fromkeys(("models", "pipeline", "flows", "cluster")))
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/smoke@champion")
module = model.unwrap_python_model().module
path = mlflow.artifacts.download_artifacts("models:/smoke@champion")
alone = timm.create_model("local-dir:" + path + "/artifacts/hf", pretrained=True).eval()
x = torch.randn(2, 3, 32, 32)
assert torch.equal(module(x), alone(x))
array = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
rows = [model.predict([image]) for image in (array, Image.fromarray(array))]
assert rows[0].shape == (1, 10) and np.allclose(rows[0], rows[1]) and abs(rows[0].sum() - 1) < 1e-5
module.train()
module(x).sum().backward()
assert module.head.weight.grad is not None
"""
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    arguments = [sys.executable, "-P", "-c", code, f"sqlite:///{home / 'mlflow.db'}"]
    done = subprocess.run(arguments, env=environment, cwd="/", capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


RECORDED = ("--set", "data.record=true", "--set", "steps=200", "--set", "checkpoint.every_steps=5")


@pytest.fixture(scope="module")
def uninterrupted(module_home, digits):
    run = module_home / "runs" / "uninterrupted"
    vit(module_home, "pretrain", "pretrain_supervised_debug", "--data", str(digits), "--run-dir", str(run), *RECORDED)
    return run


def test_after_kill_9_of_everything_resume_reads_the_same_samples_to_the_same_bits(uninterrupted, module_home, digits):
    run = module_home / "runs" / "killed"
    process = start(
        module_home, "pretrain", "pretrain_supervised_debug", "--data", str(digits), "--run-dir", str(run), *RECORDED
    )
    wait_for_checkpoint(run, 10)
    os.killpg(process.pid, signal.SIGKILL)
    job = json.loads((run / "job.json").read_text())
    os.kill(int(job["id"].partition(":")[0]), signal.SIGKILL)  # its ranks die with it
    process.wait()
    vit(module_home, "resume", str(run))
    assert consumed(run) == consumed(uninterrupted)
    ours, theirs = weights(run), weights(uninterrupted)
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in theirs)
    assert len(list((run / "attempts").iterdir())) == 2


def test_a_run_stops_on_request_with_75_and_goes_on_at_another_world_size_and_stage(uninterrupted, module_home, digits):
    run = module_home / "runs" / "stopped"
    process = start(
        module_home, "pretrain", "pretrain_supervised_debug", "--data", str(digits), "--run-dir", str(run), *RECORDED
    )
    wait_for_checkpoint(run, 5)
    vit(module_home, "stop", str(run))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "checkpoint complete" in output, output
    vit(module_home, "resume", str(run), "--set", "zero.stage=3", "--set", "profile.ranks_per_node=1")
    assert consumed(run) == consumed(uninterrupted)
    assert RunDirectory(run).newest_checkpoint().step == 200


def test_ranks_run_under_torchrun_as_well(module_home, digits):
    run = module_home / "runs" / "torchrun"
    vit(module_home, "pretrain", "pretrain_mae_debug", "--data", str(digits), "--run-dir", str(run), "--dry-run")
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pipeline.pretrain", str(run)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 20
    assert len(list((run / "attempts").iterdir())) == 1
    job, beat = (json.loads((run / path).read_text()) for path in ("job.json", "attempts/01/heartbeat/node-000"))
    assert job["id"].startswith(f"{beat['pid']}:") and beat["ranks"].keys() == {"0", "1"}  # found, and counted


def test_the_same_command_again_finds_the_run_done(pretrained, module_home, digits):
    output = vit(module_home, "pretrain", "pretrain_mae_debug", "--data", str(digits), "--run-dir", str(pretrained))
    assert "already done" in output
    assert len(list((pretrained / "attempts").iterdir())) == 1


def test_a_rank_that_dies_is_named_and_the_code_is_76(module_home, digits):
    run = module_home / "runs" / "one-dead"
    process = start(module_home, "pretrain", "pretrain_supervised_debug", "--data", str(digits), "--run-dir", str(run),
                    "--set", "steps=100000")  # fmt: skip
    wait_for_checkpoint(run, 10)
    beat = json.loads((run / "attempts/01/heartbeat/node-000").read_text())
    os.kill(beat["ranks"]["1"], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 76 and "rank 1 was killed by signal 9" in output, output


def test_a_shard_that_is_cut_while_training_is_named_and_the_code_is_1(module_home, digits, tmp_path):
    import shutil

    copy, run = tmp_path / "digits", module_home / "runs" / "cut"
    shutil.copytree(digits, copy)
    process = start(module_home, "pretrain", "pretrain_supervised_debug", "--data", str(copy), "--run-dir", str(run),
                    "--set", "steps=100000")  # fmt: skip
    wait_for_checkpoint(run, 10)
    shard = sorted(copy.glob("train-*.tar"))[0]
    os.truncate(shard, 4096)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and shard.name in output, output
