"""`vit finetune MODEL --set tuning.kind=lora` as a person types it, on real digits, and `vit register` behind it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from pipeline.registry.locate import locate_model
from pipeline.registry.weights import load_model
from pipeline.run_directory import RunDirectory
from tests.pipeline.training.test_distillation import exported

pytestmark = pytest.mark.slow


def vit(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "flows", *words], capture_output=True, text=True, env=os.environ, timeout=500
    )


def test_digits_are_learned_by_few_parameters_and_the_merged_model_is_registered(home, digits, tmp_path):
    model = exported(tmp_path / "model", ("a", "b"), image_size=8, patch_size=2, pooling="mean")
    done = vit(
        "finetune", model, "--data", str(digits), "--recipe", "finetune_digits", "--run-dir", str(home / "runs/lora"),
        "--set", "tuning.kind=lora", "--set", "tuning.targets=[qkv,proj,fc1,fc2]",
        "--set", "steps=60", "--set", "optimizer.learning_rate=1e-2", "--set", "optimizer.layer_decay=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDirectory(home / "runs" / "lora")
    plan, lines = run.plan(), [json.loads(line) for line in (run.attempt(1).path / "metrics.jsonl").open()]
    share = 100 * plan["trained_parameters"] / plan["parameters"]
    said = f"trained parameters {plan['trained_parameters']:,} of {plan['parameters']:,} ({share:.3g} %), tuning lora"
    assert said in done.stdout and said in run.attempt(1).log(0).read_text()
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    source = locate_model(str(run.path), tracking_uri="", home=home)
    logits = load_model(source)(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 10) and logits.isfinite().all()
    registered = vit("register", "lora", "--name", "tuned")
    assert registered.returncode == 0 and "models:/tuned/1 is champion" in registered.stdout, registered.stdout
