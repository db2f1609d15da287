"""Datasets behind URLs: every sample equals the local one, whatever the server does, or the fault has a name."""

import importlib.util
import os
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import DataError, FaultError, InputError
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from pipeline.storage import remote
from pipeline.storage.cache import ShardCache
from pipeline.storage.location import Url, file_system_type, is_remote, joined, location, stream
from tests.pipeline.flaky_proxy import Fault


def all_samples(reader):
    return [reader.read(shard, sample) for shard, size in enumerate(reader.shard_sizes) for sample in range(size)]


@pytest.fixture
def expected(local_index):
    return all_samples(ShardReader(local_index, "train"))


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 64 << 20)


@pytest.fixture
def in_memory(local_index):
    """A copy of the dataset in this process's memory file system."""
    url = f"memory://{uuid.uuid4()}/ants"
    files = fsspec.filesystem("memory")
    files.put(f"{local_index.directory}/", url, recursive=True)
    yield url
    files.rm(url, recursive=True)


@pytest.mark.parametrize(
    "directory, name, whole",
    [
        ("s3://bucket/sets/ants/", "train-0.tar", Url("s3://bucket/sets/ants/train-0.tar")),
        ("s3://bucket/ants", "gs://other/0.tar", Url("gs://other/0.tar")),
        ("s3://bucket/ants", "/disk/0.tar", Path("/disk/0.tar")),
        ("/sets/ants", "s3://bucket/0.tar", Url("s3://bucket/0.tar")),
        ("/sets/ants", "/disk/0.tar", Path("/disk/0.tar")),
        ("/sets/ants", "0.tar", Path("/sets/ants/0.tar")),
        ("file:///sets/ants", "0.tar", Path("/sets/ants/0.tar")),
    ],
)
def test_a_shard_lies_in_its_dataset_unless_its_location_is_whole(directory, name, whole):
    assert joined(location(directory), name) == whole
    assert location(directory).name == "ants"


@pytest.mark.parametrize("who", ["ftp://me:hunter2@", "https://hunter2@", "HTTP://hunter2@", "simplecache::https://hunter2@",
                                 "zip://a::https://me:hunter2@"])  # fmt: skip
def test_a_url_with_a_password_or_a_token_is_refused_without_repeating_it(who):
    with pytest.raises(InputError, match="credentials") as caught:
        location(f"{who}server/ants")
    assert "hunter2" not in str(caught.value)


def test_a_user_alone_is_no_secret():
    assert str(location("sftp://me@server/ants@home/")) == "sftp://me@server/ants@home"
    assert str(location("https://server/@me/ants")) == "https://server/@me/ants"


def test_urls_and_network_file_systems_are_remote_and_disks_are_not(tmp_path):
    assert is_remote(Url("s3://bucket/ants")) and is_remote(Url("memory://ants"))
    assert not is_remote(tmp_path / "nowhere")
    kind = file_system_type(tmp_path)
    assert is_remote(tmp_path, {kind: "this one"}) and not is_remote(tmp_path, {kind + 1: "another"})
    assert file_system_type(Path("/proc")) == 0x9FA0  # PROC_SUPER_MAGIC: the number is where we look for it


def test_a_protocol_without_its_package_names_the_extra_to_install():
    if importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed here")
    with pytest.raises(InputError, match=r"gs://bucket/ants.*install the extra: uv sync --extra gs"):
        read_index("gs://bucket/ants")
    with pytest.raises(InputError, match="nonsense:// cannot be read here"):
        read_index("nonsense://bucket/ants")


@pytest.mark.parametrize("through_cache", [False, True])
def test_a_dataset_in_memory_is_read_and_checked_like_a_local_one(in_memory, expected, cache, through_cache):
    index = read_index(in_memory, check_sizes=True)
    assert str(index.directory) == in_memory and index.directory.name == "ants"
    reader = ShardReader(index, "train", cache if through_cache else None)
    assert all_samples(reader) == expected
    assert reader.record(0, 0)["sha256"]
    assert check_dataset(in_memory, full=False) == check_dataset(in_memory, full=True) == []


def test_what_is_missing_or_cut_behind_a_url_is_named(in_memory, local_index, cache):
    files, shards = fsspec.filesystem("memory"), local_index.shards("train")
    index = read_index(in_memory)
    files.pipe(f"{in_memory}/{shards[0].name}", files.cat(f"{in_memory}/{shards[0].name}")[:-600])
    files.rm(f"{in_memory}/{shards[1].name}")
    changed = bytearray(files.cat(f"{in_memory}/{shards[2].name}"))
    changed[700] ^= 1
    files.pipe(f"{in_memory}/{shards[2].name}", bytes(changed))
    with pytest.raises(InputError, match=f"{shards[0].name}: cut") as caught:
        read_index(in_memory, check_sizes=True)
    assert len(caught.value.problems) == 2 and f"{in_memory}/{shards[1].name}" in caught.value.problems[1]
    for reader in (ShardReader(index, "train"), ShardReader(index, "train", cache)):
        for shard, cause in enumerate(("cut", "missing", "changed")):
            with pytest.raises(DataError, match=f"{in_memory}/{shards[shard].name}") as caught:
                reader.read(shard, 0)
            assert (caught.value.cause, caught.value.shard) == (cause, shards[shard].name)
    assert [name for name in os.listdir(cache.directory) if name.endswith((".tar", ".partial"))] == []
    with pytest.raises(InputError, match="no such dataset"):
        read_index(in_memory + "/nowhere")
    with pytest.raises(InputError, match="no such path"):
        check_dataset(in_memory + "/nowhere", full=False)


def test_a_dataset_in_an_object_store_is_read_with_and_without_a_cache(uploaded, client, proxy, expected, cache):
    index = read_index(uploaded, check_sizes=True)
    assert all_samples(ShardReader(index, "train")) == expected
    assert len(proxy.downloads) == len(expected)  # one range per sample
    proxy.downloads.clear()
    assert all_samples(ShardReader(index, "train", cache)) == expected
    assert sorted(path.rpartition("/")[2] for path in proxy.downloads) == [s.name for s in index.shards("train")]
    assert check_dataset(uploaded, full=True) == []


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("drop", 1000), Fault("drop", 0), Fault("drop", 1), Fault("drop", 4097)],
        [Fault("busy")] * 3,
        [Fault("stall", 2000), Fault("busy"), Fault("drop", 700)],
    ],
    ids=["drops", "503", "stall"],
)
@pytest.mark.parametrize("through_cache", [False, True])
def test_no_fault_of_the_server_loses_repeats_or_changes_a_sample(
    uploaded, client, proxy, expected, cache, faults, through_cache
):
    proxy.faults.extend(faults)
    reader = ShardReader(read_index(uploaded), "train", cache if through_cache else None)
    assert all_samples(reader) == expected
    assert not proxy.faults  # every one of them has been met


def test_a_connection_that_always_breaks_is_resumed_from_where_it_broke(client, proxy, uploaded, s3_port):
    content = os.urandom(1_500_000)
    from s3fs import S3FileSystem

    server = S3FileSystem(key="k", secret="s", endpoint_url=f"http://127.0.0.1:{s3_port}")
    server.pipe_file("pictures/large.tar", content)
    proxy.always = Fault("drop", 200_000)
    assert b"".join(stream(Url("s3://pictures/large.tar"), len(content))) == content
    assert len(proxy.downloads) < 60


def test_a_server_that_does_not_answer_is_a_fault_of_the_infrastructure(uploaded, client, proxy, cache, monkeypatch):
    index = read_index(uploaded)
    monkeypatch.setenv("VIT_STORAGE_PATIENCE_SECONDS", "0.5")
    proxy.always = Fault("busy")
    for reader in (ShardReader(index, "train"), ShardReader(index, "train", cache)):
        with pytest.raises(FaultError, match=rf"{uploaded}/train-000000.tar: no answer in \d+ attempts over .*last: "):
            reader.read(0, 0)
    assert not list(cache.directory.glob("*.tar*"))


def test_a_setting_that_is_no_number_is_an_input_error(in_memory, monkeypatch):
    monkeypatch.setenv("VIT_STORAGE_PATIENCE_SECONDS", "long")
    with pytest.raises(InputError, match="VIT_STORAGE_PATIENCE_SECONDS=long"):
        read_index(in_memory)


def test_a_forked_child_reads_on_after_its_parent_has_used_the_faster_client(uploaded, proxy, expected, tmp_path):
    index = read_index(uploaded)
    assert all_samples(ShardReader(index, "train", ShardCache(tmp_path / "parent", 64 << 20))) == expected
    child = os.fork()
    if child == 0:
        read = all_samples(ShardReader(index, "train", ShardCache(tmp_path / "child", 64 << 20)))
        os._exit(0 if read == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_uses_the_faster_client_where_its_parent_has_not(
    uploaded, proxy, expected, tmp_path, monkeypatch
):
    if importlib.util.find_spec("obstore") is None:
        pytest.skip("needs obstore, which `uv sync` installs")
    monkeypatch.setattr(remote, "_obstore_process", None)
    index = read_index(uploaded, check_sizes=True)
    assert ShardReader(index, "train").read(0, 0) == expected[0]
    assert remote._obstore_process is None  # what a rank does before it forks leaves the choice open
    # A new interpreter: in this one obstore may have run for another test.
    code = f"""
import os
from pipeline.storage import remote
from pipeline.storage.cache import ShardCache
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
index = read_index("{uploaded}", check_sizes=True)
if child := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
ShardReader(index, "train", ShardCache("{tmp_path}", 1 << 30)).read(0, 0)
os._exit(0 if remote._obstore_process == os.getpid() else 1)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
