"""Datasets for the tests: small pictures, and a real S3-compatible server on loopback behind a flaky proxy."""

import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.ports import free_port
from pipeline.shards.index import read_index
from pipeline.storage import remote
from tests.pipeline.flaky_proxy import FlakyProxy
from tests.pipeline.pictures import small_dataset

BUCKET = "pictures"
DEADLINE_SECONDS = 30


@pytest.fixture(scope="session")
def s3_port():
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("needs moto[server] and s3fs, which `uv sync` installs")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not _answers(port):
        assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
        time.sleep(0.05)
    yield port
    server.kill()
    server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def local_index(tmp_path_factory):
    """The dataset that the server has, on the local disk."""
    return read_index(small_dataset(tmp_path_factory.mktemp("local")).directory)


@pytest.fixture(scope="session")
def uploaded(s3_port, local_index):
    """The URL of the dataset in the server."""
    from s3fs import S3FileSystem

    server = S3FileSystem(key="k", secret="s", endpoint_url=f"http://127.0.0.1:{s3_port}")
    server.mkdir(BUCKET)
    server.put(f"{local_index.directory}/", f"{BUCKET}/sets/ants", recursive=True)
    return f"s3://{BUCKET}/sets/ants"


@pytest.fixture
def proxy(s3_port, uploaded, monkeypatch):
    """A proxy between this process's clients and the server; the clients give up after a second."""
    made = FlakyProxy(s3_port)
    settings = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    settings |= {"AWS_ENDPOINT_URL": made.url, "VIT_STORAGE_STALL_SECONDS": "1"}
    settings |= {"VIT_STORAGE_PATIENCE_SECONDS": "10"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    forget_clients()
    yield made
    forget_clients()
    made.close()


@pytest.fixture(params=["obstore", "fsspec"])
def client(request, proxy, monkeypatch):
    """Both clients: the second as in a child of a process that has used obstore."""
    if request.param == "fsspec":
        monkeypatch.setattr(remote, "_obstore_process", -1)
    elif importlib.util.find_spec("obstore") is None:
        pytest.skip("needs obstore, which `uv sync` installs")
    else:
        monkeypatch.setattr(remote, "_obstore_process", None)
    assert (remote._obstore("s3://pictures/x") is None) == (request.param == "fsspec")
    return request.param


def forget_clients() -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    remote._obstore_stores.clear()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """108 pictures in 12 shards of 9: an epoch is 9 batches of 12."""
    directory = tmp_path_factory.mktemp("pictures")
    small_dataset(directory, per_class=54, samples_per_shard=9, splits="folders", split_fractions={"train": 1.0})
    return directory / "dataset"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a mebibyte, to be filled."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
