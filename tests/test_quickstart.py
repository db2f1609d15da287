"""`vit quickstart`, as the README gives it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.registry.tracking import connect
from tests.pipeline.pages import Page

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
    report = Path(summary["report"])
    assert report.parent.name == "register-digits-001" and f"open in a browser: {report}" in done.stdout
    page = Page(report.read_text())
    page.require_alone()
    assert "Registered as models:/digits/1" in page.text and "could not be shown" not in page.text
    assert "3-NN, 10 % of the labels" in page.text and report.stat().st_size < 5_000_000
    assert page.links.count("#s0") == 1 and sum(link.startswith("data:image/") for link in page.links) >= 7
    client = connect(summary["tracking_uri"])
    run_id = client.get_model_version("digits", "1").run_id
    logged = {artifact.path for folder in ("", "lifecycle") for artifact in client.list_artifacts(run_id, folder)}
    assert {"report.html", "lifecycle/report.html"} <= logged
