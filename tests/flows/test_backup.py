"""A home of one person's is backed up while it is written to, lost, and restored, by README's own commands."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest

from tests.flows.readme import block
from tests.pipeline.registration.stores import exported, registered


@pytest.mark.slow
def test_a_home_with_sqlite_comes_back_with_its_runs_and_models(tmp_path, monkeypatch):
    home, backup = tmp_path / "home", tmp_path / "backup"
    (home / "runs" / "a-run").mkdir(parents=True)
    (home / "runs" / "a-run" / "result.json").write_text("{}")
    backup.mkdir()
    registered(home, exported(tmp_path / "model"))
    python = str(Path(sys.executable).parent)
    places = {"VIT_HOME": str(home), "BACKUP": str(backup), "PATH": f"{python}:{os.environ['PATH']}"}

    writer = sqlite3.connect(home / "mlflow.db")  # in the middle of a write, which the copy must not have half of
    writer.execute("INSERT INTO experiments (name, lifecycle_stage) VALUES ('half', 'active')")
    subprocess.run(["bash", "-c", block("back up one person's")], env=os.environ | places, check=True)
    writer.rollback()
    writer.close()
    home.rename(tmp_path / "lost")

    subprocess.run(["bash", "-c", block("restore one person's")], env=os.environ | places, check=True)
    assert (home / "runs" / "a-run" / "result.json").is_file()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{home / 'mlflow.db'}")
    assert mlflow.get_experiment_by_name("half") is None
    model = mlflow.pyfunc.load_model("models:/ants@champion")
    assert model.predict([np.zeros((32, 32, 3), np.uint8)]).shape == (1, 3)
