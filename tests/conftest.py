"""Fixtures shared by the packages: a dataset of real digits, and a home that is never the person's own."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, missing
from tests.flows import postgres as postgresql

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")


SERVERS = ("cluster", "flows")  # folders whose tests hold the usual ports, a SLURM, a PostgreSQL: one process runs them


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite, none beside pytest's own where a part of it is named."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return 2 if whole and (os.cpu_count() or 1) > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The servers' tests are one piece of work and begin at once; of the others each file is one, the longest first."""
    folders = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    items.sort(key=lambda item: (folders[item] not in SERVERS, item.path.name != "test_quickstart.py"))
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("servers" if folders[item] in SERVERS else file))


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


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Slurm]:
    """A real SLURM of two nodes for the whole session. Tests ask for `slurm`."""
    with _running_slurm() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster, monkeypatch) -> Iterator[Slurm]:
    """The session's SLURM, empty and whole, and the environment in which its commands work."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    slurm_cluster.cancel_everything()
    slurm_cluster.wait_for_nodes()


@pytest.fixture
def isolated_slurm(monkeypatch) -> Iterator[Slurm]:
    """A SLURM whose nodes can be cut off the network, for one test, and the environment in which its commands work."""
    with _running_slurm(isolated=True) as cluster:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        yield cluster


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgresql.Postgres]:
    """A real PostgreSQL for the whole session, which asks for a password."""
    if postgresql.folder() is None:
        reason = "no PostgreSQL on this machine: apt-get install postgresql"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with postgresql.running_postgres() as server:
        yield server


@contextlib.contextmanager
def _running_slurm(*, isolated: bool = False) -> Iterator[Slurm]:
    if (reason := missing()) is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    root = Path(
        tempfile.mkdtemp(prefix="slurm-")
    )  # pytest's own folders are too deep for sockets, and closed to others
    cluster = Slurm(root, isolated=isolated)
    try:
        yield cluster.start()
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
