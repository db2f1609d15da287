"""Shards made by the workers of a real Dask cluster: the same bytes, whoever of them dies, and nothing left at work."""

import os
import signal
import time
from dataclasses import dataclass, replace
from functools import partial

import pytest
from distributed import Client, LocalCluster

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.build import ingest
from pipeline.ingestion.isolation import Limits, TooManyFaults
from pipeline.ingestion.machines import dask_cluster, shard_groups
from pipeline.ingestion.machines.dask_cluster import run_in_dask
from pipeline.ingestion.machines.shard_groups import ShardGroup, in_groups
from pipeline.ingestion.making import IngestError
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.shard_contract import ShardSummary
from pipeline.ingestion.statistics import ImageTotals
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
    assert not list((tmp_path / "dataset").glob(".tmp-*"))
    with Client(cluster, set_as_default=False) as client:
        assert not any(client.processing().values())


@dataclass(frozen=True)
class Deed:
    """A shard job that says by an empty file when it began."""

    name: str
    faults: int | None = 0  # None: it fails
    num_files: int = 1

    def run(self, destination):
        (destination / self.name).touch()
        if self.faults is None:
            raise ValueError("a fault of the program")
        time.sleep(0.5)
        rejected = [Rejected(f"{self.name}.jpg", "too_slow", "not decoded")] * self.faults
        return ShardSummary(self.name, "train", 1, None, "0" * 64, ImageTotals(), rejected=rejected)


def run_deeds(cluster, directory, deeds, allowed_faults=0):
    engine = partial(run_in_dask, cluster.scheduler_address)
    return [summary.name for summary in in_groups(engine, directory, deeds, Limits(60, 1 << 30), allowed_faults)]


@pytest.mark.slow
def test_where_one_group_fails_no_other_begins(tmp_path, cluster):
    deeds = [Deed("first", faults=None), *(Deed(f"other{number}") for number in range(20))]
    with pytest.raises(ValueError, match="a fault of the program"):
        run_deeds(cluster, tmp_path, deeds)
    assert 1 <= len(list(tmp_path.iterdir())) <= 5  # of the 16 that were with the cluster; and no sign is left


@pytest.mark.slow
def test_faults_are_counted_over_all_groups(tmp_path, cluster):
    with pytest.raises(TooManyFaults, match="2 too_slow; the last: not decoded"):
        run_deeds(cluster, tmp_path, [Deed("one", faults=1), Deed("two", faults=1)], allowed_faults=1)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


class EndlessCluster:
    def close(self):
        time.sleep(30)


def test_a_cluster_that_does_not_end_is_left(monkeypatch, caplog):
    monkeypatch.setattr(dask_cluster, "CLOSE_SECONDS", 0.1)
    with dask_cluster.started_cluster(f"{__name__}.EndlessCluster", {}):
        pass
    assert "the Dask cluster has not ended within 0.1 seconds; left" in caplog.text
    with pytest.raises(InputError, match="no class of Dask clusters with these options"):
        with dask_cluster.started_cluster("distributed.NoCluster", {}):
            pass


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
