"""Checkpoints copied to a real S3 server, or a folder by URL, and brought back into an empty run directory."""

import json
import shutil

import pytest

from pipeline.checkpoints.identity import facts_of_run
from pipeline.checkpoints.mirror import CheckpointMirror
from pipeline.config.stages import read_run_config
from pipeline.errors import InputError
from pipeline.run_directory import Checkpoint, RunDirectory, verified_manifest
from pipeline.storage import remote
from tests.pipeline.checkpoints.prepared import SAVED, prepared_run
from tests.pipeline.conftest import forget_clients

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
    return prepared_run(tmp_path / "run")


def saved(run: RunDirectory, step: int) -> Checkpoint:
    directory = run.checkpoints / f"step-{step:08d}"
    shutil.copytree(SAVED, directory)
    manifest = json.loads((directory / "manifest.json").read_text()) | {"step": step}
    manifest |= facts_of_run(read_run_config(run.path), run.plan())
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return Checkpoint(directory, manifest)


def test_copies_come_back_into_an_empty_run_directory_and_the_newest_that_is_whole_is_taken(url, run):
    mirror = CheckpointMirror(url, run)
    for step in (4, 8, 12):
        mirror.copy(saved(run, step))
    mirror.remove(["step-00000004"])
    mirror.wait()
    assert sorted(remote.names_in(mirror.url)) == ["run.json", "step-00000008", "step-00000012"]
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


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("memory://copies", "expected a URL that begins with one of s3://"),  # would end with the process
        ("foo://bucket", "expected a URL that begins with one of s3://"),
        ("/folder", "expected a URL that begins with one of s3://"),
        ("s3://", "expected a URL that begins with one of s3://"),
        ("file://folder", "is relative; write file:///folder"),
        ("s3://key:secret@bucket", "must not carry credentials"),
    ],
)
def test_a_url_that_keeps_no_copies_is_refused_in_the_config(tmp_path, value, words):
    with pytest.raises(InputError, match=words) as refused:
        prepared_run(tmp_path, f"checkpoint.mirror={value}")
    assert "secret" not in str(refused.value)


def test_another_run_of_the_same_name_takes_replaces_and_removes_nothing(url, run, tmp_path, caplog):
    mirror = CheckpointMirror(url, run)
    mirror.copy(saved(run, 4))
    mirror.wait()
    other = prepared_run(tmp_path / "elsewhere" / "run", "seed=7", "optimizer.learning_rate=2e-3")
    foreign = CheckpointMirror(url, other)
    words = (
        rf"belongs to another run than {other.path} \(its optimizer.learning_rate, seed differ\); choose another "
        "checkpoint.mirror or --run-dir"
    )
    for refused in (foreign.claim, foreign.fetch_newest):
        with pytest.raises(InputError, match=words):
            refused()
    assert not other.checkpoints.exists()
    foreign.copy(saved(other, 8))
    foreign.remove(["step-00000004"])
    foreign.wait()
    assert caplog.text.count("not up to date, training goes on") == 2
    assert sorted(remote.names_in(mirror.url)) == ["run.json", "step-00000004"]


def test_the_same_recipe_begun_again_on_an_empty_disk_is_the_same_run(url, run, tmp_path):
    mirror = CheckpointMirror(url, run)
    mirror.copy(saved(run, 4))
    mirror.wait()
    again = prepared_run(tmp_path / "new disk" / "run", "zero.stage=2", "checkpoint.keep=5")
    CheckpointMirror(url, again).claim()
    assert CheckpointMirror(url, again).fetch_newest() == again.checkpoints / "step-00000004"


def test_copies_that_were_made_before_places_had_owners_are_still_those_of_their_run(url, run, tmp_path):
    mirror = CheckpointMirror(url, run)
    mirror.copy(saved(run, 4))
    mirror.wait()
    remote.remove(f"{mirror.url}/run.json")
    with pytest.raises(InputError, match="its seed differs"):
        CheckpointMirror(url, prepared_run(tmp_path / "elsewhere" / "run", "seed=7")).claim()
    CheckpointMirror(url, run).claim()
