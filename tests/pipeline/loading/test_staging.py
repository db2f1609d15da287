"""Staging ahead: in order of use, within its bytes, and never outliving its rank."""

import os
import signal
import time

import pytest

from pipeline.loading.staging import MOST_STEPS_AHEAD, Stager, _Plan
from pipeline.shards.reader import ShardReader
from pipeline.storage.cache import ShardCache

DEADLINE_SECONDS = 20


def until(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ends(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 64 << 20)


@pytest.fixture
def far(local_index, cache):
    """The local dataset, as if it lay on a network file system."""
    return ShardReader(local_index, "train", cache, remote=True)


def staged(index, cache):
    return [number for number, s in enumerate(index.shards("train")) if (cache.directory / f"{s.sha256}.tar").exists()]


def shard_of_step(step):
    return [(0, step)]


def ahead(index, shards):
    return sum(shard.bytes for shard in index.shards("train")[:shards])


def test_shards_come_ahead_of_use_and_no_further_than_the_bytes_allow(local_index, cache, far):
    steps = len(local_index.shards("train"))
    assert steps >= 4
    stager = Stager(far, cache, shard_of_step, steps, ahead(local_index, 2))
    try:
        until(lambda: staged(local_index, cache) == [0, 1])
        time.sleep(0.2)  # time enough to go too far
        assert staged(local_index, cache) == [0, 1]
        for step in range(steps - 2):
            stager.consumed(step)
            until(lambda step=step: staged(local_index, cache) == list(range(step + 3)))
    finally:
        stager.close()
    plain = ShardReader(local_index, "train")
    assert [far.read(shard, 1) for shard in range(steps)] == [plain.read(shard, 1) for shard in range(steps)]


def test_a_run_that_goes_on_stages_from_its_own_step(local_index, cache, far):
    stager = Stager([far], cache, shard_of_step, 4, ahead(local_index, 1), first_step=2)
    until(lambda: staged(local_index, cache) == [2])
    stager.close()


def test_nothing_is_started_where_nothing_is_to_be_staged(local_index, cache):
    near = ShardReader(local_index, "train", cache)
    assert Stager(near, cache, shard_of_step, 3, 1 << 30).pid is None
    far_without_cache = ShardReader(local_index, "train", None, remote=True)
    stager = Stager(far_without_cache, None, shard_of_step, 3, 1 << 30)
    stager.consumed(0)
    stager.close()
    assert stager.pid is None


def test_the_process_ignores_stop_signals_and_ends_when_it_is_closed(local_index, cache, far):
    before = set(os.listdir("/dev/shm"))
    stager = Stager(far, cache, shard_of_step, 3, ahead(local_index, 1))
    until(lambda: staged(local_index, cache) == [0])
    pid = stager.pid
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(pid, number)
    stager.consumed(0)
    until(lambda: staged(local_index, cache) == [0, 1])
    assert set(os.listdir("/dev/shm")) <= before
    stager.close()
    stager.close()
    assert ends(pid)


def test_the_process_dies_with_a_rank_that_was_killed(local_index, cache, far):
    read_end, write_end = os.pipe()
    rank = os.fork()
    if rank == 0:
        stager = Stager(far, cache, shard_of_step, 3, 1)
        os.write(write_end, str(stager.pid).encode())
        signal.pause()
    pid = int(os.read(read_end, 20))
    until(lambda: staged(local_index, cache) == [0])
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    until(lambda: ends(pid))


def test_a_shard_that_cannot_be_staged_holds_up_no_other(uploaded, proxy, cache, local_index):
    from s3fs import S3FileSystem

    from pipeline.shards.index import read_index

    missing = local_index.shards("train")[1].name
    server = S3FileSystem(key="k", secret="s", endpoint_url=f"http://127.0.0.1:{proxy.upstream}")
    server.mv(f"{uploaded}/{missing}", f"{uploaded}/away.tar")
    try:
        stager = Stager(ShardReader(read_index(uploaded), "train", cache), cache, shard_of_step, 3, 1 << 30)
        until(lambda: staged(local_index, cache) == [0, 2])
        stager.close()
    finally:
        server.mv(f"{uploaded}/away.tar", f"{uploaded}/{missing}")


def test_the_plan_counts_bytes_until_first_use_and_keeps_shards_until_last_use(far, local_index):
    sizes = [shard.bytes for shard in local_index.shards("train")]
    steps = {0: [0], 1: [0, 1], 2: [1, 2], 3: [0, 3]}
    plan = _Plan([far], lambda step: [(0, shard) for shard in steps[step]], 0, 4, sizes[0] + sizes[1])
    assert plan.advance(-1) == [(0, 0), (0, 1)]
    assert plan.needed() == [(0, 1), (0, 0)]  # the next to be used is renewed last
    assert plan.advance(0) == [(0, 2)]
    assert plan.advance(1) == [(0, 3)] and set(plan.needed()) == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert plan.advance(2) == [] and set(plan.needed()) == {(0, 0), (0, 3)}
    assert plan.advance(3) == [] and plan.needed() == []


def test_a_plan_that_was_overtaken_does_not_stage_what_is_past(far):
    plan = _Plan([far], shard_of_step, 0, 4, 1)
    assert plan.advance(-1) == [(0, 0)]
    assert plan.advance(2) == [(0, 3)]


def test_the_plan_looks_a_bounded_number_of_steps_ahead(far):
    asked = []
    plan = _Plan([far], lambda step: asked.append(step) or [(0, 0)], 5, 10**9, 1 << 40)
    plan.advance(4)
    assert asked == list(range(5, 5 + MOST_STEPS_AHEAD))
