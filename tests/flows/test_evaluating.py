"""Protocols that train first: through the command line, on real ranks, and not twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
datasets: {{digits: {{data: {digits}}}}}
protocols: [linear-mae-v1, finetune-transfer-v1]
training:
  linear-mae-v1: {{steps: 2, global_batch_size: 16, micro_batch_size: 8}}
  finetune-transfer-v1: {{steps: 2, global_batch_size: 16, micro_batch_size: 8}}
settings: {{worst_images: 0}}
"""


def vit(*arguments: str) -> str:
    """Run a command to its end; HOME comes from the environment."""
    done = subprocess.run([sys.executable, "-m", "flows", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_what_protocols_train_is_trained_in_one_job_scored_by_their_names_and_found_again(home, digits, tmp_path):
    run, suite = tmp_path / "masked", tmp_path / "suite.yaml"
    one_rank = ["--set", "profile.ranks_per_node=1"]
    vit("pretrain", "pretrain_mae_debug", "--data", str(digits), "--set", "steps=2", "--run-dir", str(run), *one_rank)
    suite.write_text(SUITE.format(digits=digits))
    vit("evaluate", str(run), "--suite", str(suite), *one_rank)
    result = json.loads((home / "runs/evaluate-suite-001/result.json").read_text())
    ends = "+steps=2+global_batch_size=16+micro_batch_size=8/digits/top1"
    assert {f"eval/{name}{ends}" for name in ("linear-mae-v1", "finetune-transfer-v1")} <= result["metrics"][
        "masked"
    ].keys()
    trained = sorted(path.parent for path in home.glob("runs/finetune_*/result.json"))
    assert len(trained) == 2 and len(list(home.glob("runs/sequence-*"))) == 1
    before = {path: (Path(path) / "result.json").stat().st_mtime_ns for path in trained}
    vit("evaluate", str(run), "--suite", str(suite), *one_rank)
    assert {path: (Path(path) / "result.json").stat().st_mtime_ns for path in trained} == before
    assert len(list(home.glob("runs/sequence-*"))) == 1
    again = json.loads((home / "runs/evaluate-suite-002/result.json").read_text())
    assert again["metrics"] == result["metrics"]
