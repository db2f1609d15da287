"""Shards made by the workers of a real Dask cluster: the same bytes, whoever of them dies, and nothing left at work."""

import os
import signal
import time
from dataclasses import replace

import pytest
from distributed import Client, LocalCluster

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.ingestion.isolation import Limits
from pipeline.ingestion.machines import shard_groups
from pipeline.ingestion.machines.shard_groups import ShardGroup
from pipeline.ingestion.making import IngestError
from tests.pipeline.pictures import class_folders, files_of


@pytest.fixture(scope="module")
def cluster():
    """Two worker processes, restarted when they die."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def the_same(directory, other):
    names = {name for name in files_of(directory) if not name.startswith(".ingest")}
    assert names == {name for name in files_of(other) if not name.startswith(".ingest")}
    return all(files_of(directory)[name] == files_of(other)[name] for name in names)


@pytest.mark.slow
def test_the_workers_of_a_cluster_give_the_same_bytes_as_this_machine(tmp_path, monkeypatch, cluster):
    class_folders(tmp_path / "source")
    monkeypatch.chdir(tmp_path)  # relative paths are those of the one who asks
    calls = []
    config = IngestConfig(samples_per_shard=9, workers=cluster.scheduler_address)
    report = ingest("source", tmp_path / "there", config, progress=lambda *counts: calls.append(counts))
    ingest("source", tmp_path / "here", IngestConfig(samples_per_shard=9))
    assert report.shards_written > 3 and calls[0] == (0, 40, 0) and calls[-1] == (40, 40, 0) and len(calls) > 3
    assert the_same(tmp_path / "there", tmp_path / "here")
    again = ingest("source", tmp_path / "there", IngestConfig(samples_per_shard=9, workers=1))
    assert again.shards_written == 0


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tmp_path, cluster):
    source = class_folders(tmp_path / "source", per_class=40)
    with Client(cluster, set_as_default=False) as client:
        before = client.run(os.getpid)
    killed = []

    def kill_one(done, total, rejected):
        if done and not killed:
            killed.append(min(before.values()))
            os.kill(killed[0], signal.SIGKILL)

    config = IngestConfig(samples_per_shard=12, workers=cluster.scheduler_address)
    ingest(str(source), tmp_path / "there", config, progress=kill_one)
    ingest(str(source), tmp_path / "here", IngestConfig(samples_per_shard=12))
    assert killed and the_same(tmp_path / "there", tmp_path / "here")


@pytest.mark.slow
def test_what_ends_early_leaves_nobody_at_work(tmp_path, cluster):
    source = class_folders(tmp_path / "source")
    for number in range(10):
        (source / "ant" / f"broken{number}.jpg").write_text("not a picture")
    with pytest.raises(IngestError, match="of the images were rejected"):
        ingest(str(source), tmp_path / "dataset", IngestConfig(samples_per_shard=12, workers=cluster.scheduler_address))
    left = set(files_of(tmp_path / "dataset"))
    assert not any(name.startswith(".tmp-") for name in left)
    time.sleep(1)
    assert set(files_of(tmp_path / "dataset")) == left


def test_an_address_without_a_scheduler_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.ingestion.machines.dask_cluster.CONNECT_SECONDS", 0.5)
    source = class_folders(tmp_path / "source")
    with pytest.raises(InputError, match="workers: tcp://127.0.0.1:1: no Dask scheduler answers"):
        ingest(str(source), tmp_path / "dataset", IngestConfig(workers="tcp://127.0.0.1:1"))
    assert not (tmp_path / "dataset/index.json").exists()


@pytest.mark.parametrize("workers", ["127.0.0.1:8786", "http://scheduler", 0, True])
def test_anything_else_is_no_address(workers):
    with pytest.raises(ValueError):
        IngestConfig(workers=workers)


def test_a_worker_on_another_machine_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_groups, "SIGHT_SECONDS", 0.2)
    versions = tuple(shard_groups.BYTES_DEPEND_ON.items())
    group = ShardGroup([], tmp_path / ".tmp-wanted", Limits(1, 1 << 30), 0, versions, str(tmp_path))
    with pytest.raises(InputError, match="not seen by the worker on .*; DEST must lie on a file system that all"):
        group.run()
    (tmp_path / ".tmp-wanted").touch()
    assert group.run() == []
    with pytest.raises(InputError, match="Pillow .*, and 1.0 where `vit ingest` runs"):
        replace(group, versions=(("Pillow", "1.0"),)).run()


def test_groups_are_small_where_there_are_few_shards_and_bounded_where_there_are_many():
    class Job:
        def __init__(self, num_files):
            self.num_files = num_files

    sizes = {count: [len(group) for group in shard_groups._grouped([Job(1000)] * count)] for count in (3, 1000, 9000)}
    assert sizes[3] == [1, 1, 1] and set(sizes[1000]) == {3, 1} and max(sizes[9000]) == 16 and sum(sizes[9000]) == 9000
    assert max(len(group) for group in shard_groups._grouped([Job(8000)] * 9000)) == 2


def test_without_the_package_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    source = class_folders(tmp_path / "source")
    with pytest.raises(InputError, match=r"pip install 'vit-pretraining\[dask\]'"):
        ingest(str(source), tmp_path / "dataset", IngestConfig(workers="tcp://127.0.0.1:1"))
