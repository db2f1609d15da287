"""`vit quickstart`, as the README gives it."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_quickstart_ends_in_a_registered_model_and_a_table_that_is_true(home):
    done = subprocess.run(
        [sys.executable, "-m", "flows", "quickstart", "--dir", str(home)], capture_output=True, text=True,
        env=os.environ, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((home / "quickstart.json").read_text())
    rows = {(row["method"], row["labels"]): row["accuracy"] for row in summary["rows"]}
    methods = {"fine-tuned", "scratch", "3-NN", "logistic regression"}
    assert rows.keys() == {(method, labels) for method in methods for labels in (1.0, 0.1)}
    assert rows["fine-tuned", 1.0] >= 0.97 and rows["fine-tuned", 0.1] >= 0.80
    assert summary["uri"] == "models:/digits/1" and summary["seconds"] > 0
    assert os.path.getsize(summary["reconstruction"]) > 1000
    for method in methods:
        assert method in done.stdout
