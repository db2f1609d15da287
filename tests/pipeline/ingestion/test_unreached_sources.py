"""A source behind an address where nobody listens is said to be that, and soon."""

import socket

import fsspec
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import FaultError
from pipeline.ingestion.build import ingest
from pipeline.storage import remote


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/x.zip", "s3://bucket/images"])
def test_a_refused_connection_is_no_missing_file(tmp_path, monkeypatch, url):
    pytest.importorskip("s3fs" if url.startswith("s3") else "aiohttp")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        port = closed.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        if url.startswith("s3"):  # whose clients of before know the server of before
            fsspec.get_filesystem_class("s3").clear_instance_cache()
        monkeypatch.setattr(remote, "LISTING_PATIENCE_SECONDS", 1)
        with pytest.raises(FaultError, match="cannot be reached"):
            ingest(url.format(port=port), tmp_path / "dataset", IngestConfig())
    assert not (tmp_path / "dataset").exists()
