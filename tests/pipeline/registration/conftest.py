"""A home with an empty MLflow store, made once and copied: making its tables takes seconds."""

import shutil

import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(tmp_path, empty_store, monkeypatch):
    """A home of its own; MLflow's settings are as before afterwards."""
    import os

    import mlflow

    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(empty_store, home / "mlflow.db")
    before, uri = dict(os.environ), mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    yield home
    mlflow.set_tracking_uri(uri)
    os.environ.clear()
    os.environ.update(before)
