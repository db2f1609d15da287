"""Fixtures shared by the packages: a dataset of real digits, and a home that is never the person's own."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's handwritten digits as a dataset directory."""
    from pipeline.config.ingest import IngestConfig
    from pipeline.ingestion.build import ingest

    directory = tmp_path_factory.mktemp("datasets") / "digits"
    ingest("sklearn:digits", directory, IngestConfig())
    return directory


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home that every command and flow of the test finds."""
    path = tmp_path / "home"
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VIT_HOME", str(path))
    return path
