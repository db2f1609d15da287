"""The node's cache: within its limit at every moment, one download per shard, nothing left by what was killed."""

import errno
import hashlib
import logging
import os
import resource
import shutil
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import DataError, InputError
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from pipeline.storage import cache as cache_module
from pipeline.storage.cache import ShardCache, node_cache
from pipeline.storage.location import file_system_type
from tests.pipeline.pictures import small_dataset

DEADLINE_SECONDS = 20


def fetch(cache, name, size=1000):
    return cache.fetch(name, size, lambda: [bytes([ord(name[0])]) * size])


def names(cache):
    return sorted(path.name for path in cache.directory.iterdir() if not path.name.startswith("."))


def in_child(work) -> int:
    """The process id of a fork that does `work` and ends with its truth."""
    if child := os.fork():
        return child
    code = 1
    try:
        code = 0 if work() else 2
    finally:
        os._exit(code)


def until(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_is_fetched_once_and_opened_by_name(tmp_path):
    cache = ShardCache(tmp_path / "cache", 5000)
    assert cache.open("a") is None and not cache.touch("a")
    assert fetch(cache, "a")
    assert cache.fetch("a", 1000, lambda: pytest.fail("downloaded twice"))
    with open(cache.open("a"), "rb") as file:
        assert file.read() == b"a" * 1000
    assert names(cache) == ["a"] and cache.used_bytes() == 1000
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700


def test_the_least_recently_used_goes_first_and_the_limit_is_never_passed(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    for name in "abc":
        fetch(cache, name)
    cache.touch("a")
    assert fetch(cache, "d") and names(cache) == ["a", "c", "d"]
    os.close(cache.open("c"))
    assert fetch(cache, "e", 1500) and names(cache) == ["c", "e"]
    assert cache.used_bytes() <= 3000


def test_room_is_taken_before_the_first_byte_comes(tmp_path):
    cache = ShardCache(tmp_path, 3000)
    fetch(cache, "a"), fetch(cache, "b")
    seen = []

    def content():
        seen.append((cache.used_bytes(), names(cache)))
        yield b"c" * 2000

    assert cache.fetch("c", 2000, content)
    assert seen == [(3000, ["b", "c.partial"])]


def test_an_evicted_file_holds_no_bytes_though_it_is_still_open_and_reads_short(tmp_path):
    cache = ShardCache(tmp_path, 5000)
    fetch(cache, "a", 4096)
    descriptor = cache.open("a")
    fetch(cache, "b", 4096)
    assert os.fstat(descriptor).st_blocks == 0 and os.pread(descriptor, 10, 0) == b""
    os.close(descriptor)


def test_what_is_larger_than_the_cache_or_finds_no_room_is_refused_with_one_warning(tmp_path, caplog):
    cache = ShardCache(tmp_path, 3000)
    fetch(cache, "a")
    with caplog.at_level(logging.WARNING):
        assert not fetch(cache, "b", 3001) and not fetch(cache, "c", 9000)
    assert len(caplog.records) == 1 and "VIT_SHARD_CACHE_BYTES" in caplog.text
    assert names(cache) == ["a"]  # nothing was evicted in vain


def test_a_disk_without_room_is_refused_and_left_clean(tmp_path):
    cache = ShardCache(tmp_path, 1 << 30)
    fetch(cache, "a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        assert not fetch(cache, "b", 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(cache) == ["a"] and fetch(cache, "b", 2 << 20)


def test_a_file_system_that_cannot_allocate_still_keeps_the_limit_and_may_run_full(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    cache, seen = ShardCache(tmp_path, 3000), []
    assert fetch(cache, "a") and fetch(cache, "b")
    assert cache.fetch("c", 2000, lambda: seen.append(cache.used_bytes()) or [b"c" * 2000])
    assert seen == [3000] and names(cache) == ["b", "c"]
    monkeypatch.setattr(os, "pwrite", full)
    assert not fetch(cache, "d") and "d.partial" not in names(cache)


def test_a_cache_that_was_swept_away_is_made_again(tmp_path):
    cache = ShardCache(tmp_path / "cache", 3000)
    fetch(cache, "a")
    shutil.rmtree(tmp_path / "cache")
    assert fetch(cache, "a") and names(cache) == ["a"]


def test_wrong_bytes_are_tried_twice_and_leave_nothing(tmp_path):
    cache, right = ShardCache(tmp_path, 5000), b"right"
    sha256, answers = hashlib.sha256(right).hexdigest(), [[b"wrong"], [b"rig", b"ht"]]
    assert cache.fetch("a", 5, lambda: answers.pop(0), sha256)
    for content, cause in (([b"wrong"], "changed"), ([b"rig"], "cut"), ([b"right", b"er"], "changed")):
        with pytest.raises(DataError, match="s3://origin") as caught:
            cache.fetch("b", 5, lambda content=content: content, sha256, "s3://origin")
        assert caught.value.cause == cause and names(cache) == ["a"]


def test_a_file_of_another_size_is_fetched_again(tmp_path):
    cache = ShardCache(tmp_path, 5000)
    fetch(cache, "a")
    os.truncate(tmp_path / "a", 10)
    assert fetch(cache, "a") and (tmp_path / "a").stat().st_size == 1000


def test_many_processes_and_threads_download_a_shard_once(uploaded, proxy, local_index, tmp_path):
    index = read_index(uploaded)
    expected = ShardReader(local_index, "train").read(0, 0)

    def read(_=None):
        return ShardReader(index, "train", ShardCache(tmp_path, 64 << 20)).read(0, 0) == expected

    children = [in_child(read) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(read, range(2)))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(proxy.downloads) == 1


def test_a_killed_download_hurts_nobody_and_is_cleared_away(tmp_path):
    cache = ShardCache(tmp_path, 3000)

    def stuck():
        yield b"a" * 100
        signal.pause()

    killed = [in_child(lambda name=name: cache.fetch(name, 1000, stuck)) for name in ("b", "a")]
    until(lambda: names(cache) == ["a.partial", "b.partial"] and cache.used_bytes() == 2000)
    waiting = in_child(lambda: fetch(cache, "a"))
    for child in killed:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitpid(waiting, 0)[1] == 0  # it took over
    assert names(cache) == ["a"] and (tmp_path / "a").read_bytes() == b"a" * 1000
    assert fetch(cache, "b") and names(cache) == ["a", "b"]


def test_a_download_under_way_is_neither_evicted_nor_cleared_away(tmp_path):
    cache = ShardCache(tmp_path, 3000)

    def content():
        assert not fetch(cache, "b", 2500) and fetch(cache, "c", 2000)
        yield b"a" * 1000

    assert cache.fetch("a", 1000, content) and names(cache) == ["a", "c"]


def test_eight_processes_in_a_small_cache_never_pass_the_limit(tmp_path):
    cache = ShardCache(tmp_path, 3500)

    def work():
        for name in "abcdefgh" * 20:
            if fetch(cache, name) and (descriptor := cache.open(name)) is not None:
                content = os.read(descriptor, 2000)
                os.close(descriptor)
                if content != name.encode() * len(content):
                    return False
        return True

    children = {in_child(work) for _ in range(8)}
    while children:
        assert cache.used_bytes() <= 3500
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            assert status == 0
            children.remove(child)
    assert all(Path(tmp_path, name).read_bytes() == name.encode() * 1000 for name in names(cache))


def test_a_reader_survives_eviction_and_damage_of_what_it_reads(local_index, tmp_path):
    plain = ShardReader(local_index, "train")
    sizes = [shard.bytes for shard in local_index.shards("train")]
    tables = sum(path.stat().st_size for path in local_index.directory.glob("*.idx"))
    cache = ShardCache(tmp_path, tables + max(sizes) + min(sizes))  # room for hardly two
    reader = ShardReader(local_index, "train", cache, remote=True)
    for _ in range(2):
        for sample in range(min(plain.shard_sizes)):
            for shard in range(len(sizes)):
                assert reader.read(shard, sample) == plain.read(shard, sample)
        assert cache.used_bytes() <= cache.limit_bytes
    cached = tmp_path / (local_index.shards("train")[0].sha256 + ".tar")
    reader.read(0, 0)
    content = bytearray(cached.read_bytes())
    content[:] = bytes(len(content))
    cached.write_bytes(content)
    assert reader.read(0, 0) == plain.read(0, 0)  # the checksum finds it, a second download mends it


def test_the_same_images_in_other_shards_share_a_cache(tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    for folder, settings in (("one", {"seed": 0}), ("other", {"seed": 1}), ("third", {"samples_per_shard": 5})):
        (tmp_path / folder).mkdir()
        small_dataset(tmp_path / folder, **settings)
        index = read_index(tmp_path / folder / "dataset")
        plain, cached = ShardReader(index, "train"), ShardReader(index, "train", cache, remote=True)
        for shard, size in enumerate(plain.shard_sizes.tolist()):
            assert [cached.read(shard, n) for n in range(size)] == [plain.read(shard, n) for n in range(size)]


def test_a_shard_larger_than_the_cache_is_read_where_it_lies(uploaded, proxy, local_index, tmp_path, caplog):
    expected = ShardReader(local_index, "train").read(0, 0)
    reader = ShardReader(read_index(uploaded), "train", ShardCache(tmp_path, 2000))
    with caplog.at_level(logging.WARNING):
        assert reader.read(0, 0) == reader.read(0, 0) == expected
    assert len(caplog.records) == 1 and "do not fit" in caplog.text
    assert len(proxy.downloads) == 2


def test_the_cache_of_a_node_lies_where_the_environment_says(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VIT_SHARD_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("VIT_SHARD_CACHE_BYTES", "12345")
    assert (node_cache().directory, node_cache().limit_bytes) == (tmp_path / "here", 12345)
    monkeypatch.setenv("VIT_SHARD_CACHE_BYTES", "2GB")
    with pytest.raises(InputError, match="VIT_SHARD_CACHE_BYTES=2GB"):
        node_cache()
    monkeypatch.delenv("VIT_SHARD_CACHE_BYTES")
    status = os.statvfs(tmp_path)
    assert 0 < node_cache().limit_bytes <= 0.51 * status.f_bavail * status.f_frsize
    monkeypatch.delenv("VIT_SHARD_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert node_cache().directory == tmp_path / f"vit-shards-{os.getuid()}"


def test_a_directory_that_cannot_hold_a_cache_is_an_input_error_with_the_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VIT_SHARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=f"{tmp_path}/file: cannot hold.*VIT_SHARD_CACHE"):
        node_cache()


def test_a_network_file_system_is_no_place_for_a_cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VIT_SHARD_CACHE", str(tmp_path))
    here = file_system_type(tmp_path)
    monkeypatch.setattr(cache_module, "is_remote", lambda where: file_system_type(where) == here)
    assert node_cache() is None and "network file system" in caplog.text
