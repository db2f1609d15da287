"""The whole stream from a remote dataset: staged ahead, cached on the node, through a server that fails."""

import os
import time

import pytest

from pipeline.config.plan import BatchPlan
from pipeline.errors import FaultError
from pipeline.loading.loader import Loader
from pipeline.loading.sources import Sources
from pipeline.loading.stream import SampleStream
from pipeline.preparation.placement import Placement
from pipeline.preparation.training import prepare_training
from pipeline.shards.index import read_index
from tests.pipeline.flaky_proxy import Fault
from tests.pipeline.loading.test_loader import drawn, loader, same

FAULTS = [Fault("drop", 1000), Fault("busy"), Fault("stall", 300), Fault("drop", 0), Fault("busy"), Fault("drop", 4097)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_SHARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_fails_changes_no_batch(local_index, uploaded, proxy, cache, workers):
    expected = drawn(loader(local_index.directory, last_step=5))
    proxy.faults.extend(FAULTS)
    assert same(drawn(loader(uploaded, workers=workers, last_step=5)), expected)
    assert len(proxy.downloads) >= len(FAULTS)
    used = {shard.sha256 + ".tar" for shard in local_index.shards("train")}
    assert used == {name for name in os.listdir(cache) if name.endswith(".tar")}


def test_ranks_of_a_node_share_one_download_of_each_shard(local_index, uploaded, proxy, cache):
    for rank in range(2):
        drawn(loader(uploaded, rank=rank, world_size=2, workers=1, last_step=5))
    assert len(set(proxy.downloads)) == len(local_index.shards("train"))
    looks = 2  # each rank looks at one sample, by a range, to learn how deep the pixels are
    assert len(proxy.downloads) - looks <= len(set(proxy.downloads))


def test_shards_are_staged_before_they_are_asked_for(local_index, uploaded, proxy, cache):
    with loader(uploaded, last_step=5):  # no batch is drawn
        deadline = time.monotonic() + 20
        while len([name for name in os.listdir(cache) if name.endswith(".tar")]) < len(local_index.shards("train")):
            assert time.monotonic() < deadline, "nothing was staged"
            time.sleep(0.05)


def test_a_server_that_stays_away_is_a_fault_of_the_infrastructure(uploaded, proxy, cache, monkeypatch):
    read_index(uploaded)
    monkeypatch.setenv("VIT_STORAGE_PATIENCE_SECONDS", "1")
    with loader(uploaded, workers=1, last_step=5) as made:
        proxy.always = Fault("busy")
        for name in os.listdir(cache):
            if name.endswith(".tar"):
                os.truncate(cache / name, 0)
        with pytest.raises(FaultError, match="no answer in .* attempts"):
            list(made)


@pytest.mark.parametrize("limit", [30_000, 200])
def test_a_cache_that_cannot_hold_what_is_read_at_a_time_is_not_filled_in_vain(
    local_index, uploaded, proxy, cache, monkeypatch, limit, caplog
):
    monkeypatch.setenv("VIT_SHARD_CACHE_BYTES", str(limit))
    expected = drawn(loader(local_index.directory, last_step=2))
    assert same(drawn(loader(uploaded, workers=1, last_step=2)), expected)
    assert "lanes of this node read" in caplog.text and "raise VIT_SHARD_CACHE_BYTES" in caplog.text
    assert not [name for name in os.listdir(cache) if name.endswith(".tar")]


def test_the_plan_notes_of_a_small_cache_what_the_ranks_will_log(uploaded, proxy, cache, monkeypatch, caplog):
    index = read_index(uploaded)

    def prepared():
        here = Placement("local", nodes=1, ranks_per_node=2, loader_workers=1, accelerators_per_node=0)
        return prepare_training("pretrain", "pretrain_mae_debug", ["data.lanes=4"], Sources((index,)), here)

    assert not any("shard cache" in note for note in prepared().notes)
    monkeypatch.setenv("VIT_SHARD_CACHE_BYTES", "30000")
    run = prepared()
    (note,) = [note for note in run.notes if "shard cache" in note]
    plan = BatchPlan(**run.plan["batches"])
    stream = SampleStream(run.config, [index])
    Loader(stream, plan, rank=0, first_step=0, last_step=1, workers=0, ranks_per_node=2).close()
    assert [record.getMessage() for record in caplog.records if "shard cache" in record.getMessage()] == [note]
    assert "the 4 lanes of this node read" in note
