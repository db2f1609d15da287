"""Checkpoints copied to a real S3 server, or a folder by URL, and brought back into an empty run directory."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoints.mirror import CheckpointMirror
from pipeline.errors import InputError
from pipeline.run_directory import Checkpoint, RunDirectory, verified_manifest
from pipeline.storage import remote
from tests.pipeline.conftest import forget_clients

SAVED = Path(__file__).parents[2] / "golden" / "checkpoint_format_1" / "step-00000004"
BUCKET = "checkpoints"


@pytest.fixture(params=["s3", "file"])
def url(request, tmp_path, monkeypatch):
    if request.param == "file":
        yield f"file://{tmp_path / 'mirror'}"
        return
    settings = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    settings |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{request.getfixturevalue('s3_port')}"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    from s3fs import S3FileSystem

    server = S3FileSystem(skip_instance_cache=True)
    if not server.exists(BUCKET):
        server.mkdir(BUCKET)
    forget_clients()
    yield f"s3://{BUCKET}/{tmp_path.name}"
    forget_clients()


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def saved(run: RunDirectory, step: int) -> Checkpoint:
    directory = run.checkpoints / f"step-{step:08d}"
    shutil.copytree(SAVED, directory)
    manifest = json.loads((directory / "manifest.json").read_text()) | {"step": step}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return Checkpoint(directory, manifest)


def test_copies_come_back_into_an_empty_run_directory_and_the_newest_that_is_whole_is_taken(url, run):
    mirror = CheckpointMirror(url, run)
    for step in (4, 8, 12):
        mirror.copy(saved(run, step))
    mirror.remove(["step-00000004"])
    mirror.wait()
    assert sorted(remote.names_in(mirror.url)) == ["step-00000008", "step-00000012"]
    shutil.rmtree(run.checkpoints)
    assert CheckpointMirror(url, run).fetch_newest() == run.checkpoints / "step-00000012"
    for name in ("manifest.json", *verified_manifest(SAVED)["files"]):
        if name != "manifest.json":
            assert (run.checkpoints / "step-00000012" / name).read_bytes() == (SAVED / name).read_bytes()
    assert run.newest_checkpoint().step == 12

    remote.remove(f"{mirror.url}/step-00000012/manifest.json")  # as if it had never been completed
    shutil.rmtree(run.checkpoints)
    assert CheckpointMirror(url, run).fetch_newest().name == "step-00000008"


def test_a_copy_that_was_changed_is_passed_over(url, run, tmp_path):
    mirror = CheckpointMirror(url, run)
    for step in (4, 8):
        mirror.copy(saved(run, step))
    mirror.wait()
    name = "rank-00001-of-00002.safetensors"
    content = bytearray((SAVED / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "changed").write_bytes(content)
    remote.upload(tmp_path / "changed", f"{mirror.url}/step-00000008/{name}")
    shutil.rmtree(run.checkpoints)
    assert CheckpointMirror(url, run).fetch_newest().name == "step-00000004"


def test_a_mirror_that_cannot_be_written_stops_nothing_and_says_so(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("VIT_STORAGE_PATIENCE_SECONDS", "0.5")
    (tmp_path / "file").write_text("in the way")
    mirror = CheckpointMirror(f"file://{tmp_path / 'file'}", run)
    mirror.copy(saved(run, 4))
    mirror.wait()
    assert "not up to date, training goes on" in caplog.text


def test_an_empty_mirror_has_nothing_and_credentials_are_refused(url, run):
    assert CheckpointMirror(url, run).fetch_newest() is None
    with pytest.raises(InputError, match="must not carry credentials"):
        CheckpointMirror("s3://key:secret@bucket/x", run)
