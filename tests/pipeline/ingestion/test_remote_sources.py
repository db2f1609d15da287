"""Sources behind URLs give what the same files give on a disk, from a real S3-compatible server and from memory."""

import os
import pickle
import threading
import uuid

import fsspec
import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.errors import FaultError, InputError
from pipeline.ingestion.archives import source as archives
from pipeline.ingestion.archives.source import ArchiveSource, archives_at
from pipeline.ingestion.build import ingest
from pipeline.ingestion.sources import objects, read_ahead
from pipeline.ingestion.sources.objects import ObjectSource
from pipeline.ingestion.sources.read_ahead import IN_FLIGHT, ReadAhead
from pipeline.shards.check import check_dataset
from pipeline.shards.index import read_index
from pipeline.shards.reader import ShardReader
from pipeline.storage import location as locations
from pipeline.storage.location import Url
from tests.pipeline.ingestion.archives.test_tar_archives import packed, samples
from tests.pipeline.ingestion.archives.test_zips import files_in, rejected_of, write_zip
from tests.pipeline.pictures import class_folders, encoded, picture, shards_of, write_tar

CONFIG = IngestConfig(samples_per_shard=7, split_fractions={"train": 1.0})
SECRET = "hunter2-secret"


@pytest.fixture
def s3(s3_port, monkeypatch):
    """(URL of a new bucket of the server, its client)"""
    from s3fs import S3FileSystem

    endpoint = f"http://127.0.0.1:{s3_port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "VIT_STORAGE_PATIENCE_SECONDS": "3",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    server = S3FileSystem(key="k", secret=SECRET, endpoint_url=endpoint, use_listings_cache=False)
    bucket = f"b{uuid.uuid4().hex[:12]}"
    server.mkdir(bucket)
    return f"s3://{bucket}", server


@pytest.fixture
def memory():
    return f"memory://{uuid.uuid4()}", fsspec.filesystem("memory")


@pytest.fixture(params=["s3", "memory"])
def store(request):
    return request.getfixturevalue(request.param)


def put(store, source, name=""):
    url, files = store
    if source.is_dir():
        files.put(f"{source}/", f"{url}/{name}", recursive=True)
    else:
        files.put(str(source), f"{url}/{name or source.name}")
    return f"{url}/{name or source.name}"


def same_shards(ours, theirs):
    assert shards_of(ours) == shards_of(theirs) and len(shards_of(ours)) > 10


@pytest.fixture
def folder(tmp_path):
    folder = class_folders(tmp_path / "source")
    (folder / "ant/a #1?é[x] .jpg").write_bytes(encoded(picture(99)))
    (folder / "notes.txt").write_text("x")
    (folder / "ant/no_suffix").write_bytes(encoded(picture(98)))
    return folder


def test_a_folder_behind_a_url_gives_the_bytes_that_it_gives_on_a_disk(tmp_path, folder, store):
    url = put(store, folder, "sets/ants")
    ingest(str(folder), tmp_path / "local", CONFIG)
    report = ingest(url + "/", tmp_path / "remote", CONFIG)
    same_shards(report.directory, tmp_path / "local")
    assert read_index(report.directory).fingerprint == read_index(tmp_path / "local").fingerprint
    assert rejected_of(report.directory) == [("notes.txt", "not_an_image")]
    assert ingest(url + "/", tmp_path / "remote", CONFIG).shards_written == 0
    store[1].pipe(f"{url}/ant/000.png", encoded(picture(500), "PNG"))
    assert ingest(url + "/", tmp_path / "remote", CONFIG).shards_written == 1
    assert check_dataset(tmp_path / "remote", full=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
def test_an_archive_behind_a_url_gives_the_bytes_of_its_folder(tmp_path, folder, store, form):
    files = files_in(folder)
    match form:
        case "zip":
            archive = write_zip(tmp_path / "ants.zip", files, 8)
        case "tar":
            archive = write_tar(tmp_path / "ants.tar", files)
        case _:
            archive = packed(tmp_path / "ants", files)
    ingest(str(folder), tmp_path / "local", CONFIG)
    report = ingest(put(store, archive), tmp_path / "remote", CONFIG)
    same_shards(report.directory, tmp_path / "local")
    put(store, archive, f"parts/a-0.{form}")
    several = ingest(f"{store[0]}/parts/*.{form}", tmp_path / "glob", CONFIG)
    assert several.samples == report.samples


@pytest.mark.slow
def test_tars_are_adopted_where_they_lie_behind_a_url_and_read_from_there(tmp_path, s3):
    store = s3
    for number in range(3):
        put(store, write_tar(tmp_path / f"set-{number}.tar", samples(5, number * 5)), f"tars/set-{number}.tar")
    url = f"{store[0]}/tars/set-{{0..2}}.tar"
    here = ingest(f"{tmp_path}/set-{{0..2}}.tar", tmp_path / "local", IngestConfig())
    there = ingest(url, tmp_path / "remote", IngestConfig())
    assert (there.tars, there.fingerprint) == ("adopt", here.fingerprint)
    index = read_index(tmp_path / "remote", check_sizes=True)
    assert [shard.location for shard in index.shards("train")] == [f"{store[0]}/tars/set-{n}.tar" for n in range(3)]
    local, remote = (ShardReader(read_index(tmp_path / name), "train") for name in ("local", "remote"))
    assert [remote.read(1, sample).image for sample in range(5)] == [local.read(1, sample).image for sample in range(5)]
    assert check_dataset(tmp_path / "remote", full=True) == check_dataset(tmp_path / "remote", full=False) == []
    assert ingest(url, tmp_path / "remote", IngestConfig()).shards_kept == 3
    assert not list((tmp_path / "remote").glob(".tmp-*"))
    of_glob = ingest(f"{store[0]}/tars/set-?.tar", tmp_path / "glob", IngestConfig(tars="rewrite"))
    assert sum(of_glob.samples.values()) == 15 and of_glob.num_classes == 3
    of_folder = ingest(f"{store[0]}/tars", tmp_path / "folder", IngestConfig())
    assert of_folder.fingerprint == here.fingerprint
    with pytest.raises(InputError, match="set-3.tar: no such tar"):
        ingest(f"{store[0]}/tars/set-{{0..3}}.tar", tmp_path / "missing", IngestConfig())
    put(store, write_tar(tmp_path / "other.tar", samples(5, 50)), "tars/set-1.tar")
    assert check_dataset(tmp_path / "remote", full=True) != []
    assert ingest(url, tmp_path / "remote", IngestConfig()).shards_written == 1


def test_no_credential_reaches_the_dataset(tmp_path, folder, s3):
    report = ingest(put(s3, folder, "ants"), tmp_path / "dataset", CONFIG)
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in report.directory.rglob("*") if path.is_file())
    for source in (f"s3://k:{SECRET}@bucket/ants", f"s3://k:{SECRET}@bucket/a.zip", f"https://x.org/ants?key={SECRET}",
                   f"https://x.org/a.zip?key={SECRET}", f"ftp://k:{SECRET}@x.org/{{0..1}}.tar"):  # fmt: skip
        with pytest.raises(InputError, match="credentials") as caught:
            ingest(source, tmp_path / "none", CONFIG)
        assert SECRET not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_what_is_not_there_or_does_not_answer_is_one_line(tmp_path, s3, monkeypatch):
    url, files = s3
    files.pipe(f"{url}/photo.jpg", encoded(picture(1)))
    for source, words in [
        (f"{url}/nothing", f"the bucket {url[5:]} holds nothing in nothing; a source holds images"),
        ("s3://nobodys-bucket/ants", "there is no bucket nobodys-bucket; a source holds images"),
        (f"{url}/a.zip", "a.zip: no such zip"),
        (f"{url}/*.tar", "no such tar"),
        (f"{url}/photo.jpg", "a file; give the folder"),
        ("nope://x/y", "nope:// cannot be read here"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            ingest(source, tmp_path / "dataset", CONFIG)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    type(files).clear_instance_cache()
    monkeypatch.setenv("VIT_STORAGE_PATIENCE_SECONDS", "0.5")
    with pytest.raises(FaultError, match="no answer in"):
        ingest(f"{url}/ants", tmp_path / "dataset", CONFIG)
    assert not (tmp_path / "dataset").exists()


def test_a_file_url_is_the_path_and_a_dataset_is_not_written_to_a_url(tmp_path, folder):
    here = ingest(str(folder), tmp_path / "dataset", CONFIG)
    again = ingest(f"file://{folder}", tmp_path / "dataset", CONFIG)
    assert (again.shards_written, again.fingerprint) == (0, here.fingerprint)
    write_zip(tmp_path / "a.zip", files_in(folder))
    assert ingest(f"file://{tmp_path}/*.zip", tmp_path / "zip", CONFIG).fingerprint == here.fingerprint
    with pytest.raises(InputError, match="lies in the source"):
        ingest(f"file://{folder}", folder / "dataset", CONFIG)
    for destination in ("s3://bucket/dataset", "gs://bucket/dataset"):
        with pytest.raises(InputError, match="written to a local directory"):
            ingest(str(folder), destination, CONFIG)
    assert not os.path.exists("s3:") and not os.path.exists("gs:")


class Waiting:
    """A source of which each read waits for `together` reads to be under way; each is counted."""

    def __init__(self, together):
        self.barrier, self.reads = threading.Barrier(together, timeout=20), []

    def read(self, path, num_bytes=-1):
        self.reads.append(path)
        if path == "bad":
            raise FileNotFoundError(path)
        self.barrier.wait()
        return path.encode()


def test_several_requests_are_in_flight_and_each_file_is_read_once(tmp_path):
    paths = tuple(map(str, range(IN_FLIGHT * 3)))
    ahead = ReadAhead(Waiting(IN_FLIGHT), paths)
    assert [ahead.read(path) for path in paths] == [path.encode() for path in paths]
    assert sorted(ahead.source.reads, key=int) == list(paths)


def test_a_read_that_fails_fails_alone_and_any_order_will_do():
    ahead = ReadAhead(Waiting(1), ("a", "bad", "b", "c"))
    assert ahead.read("a") == b"a"
    with pytest.raises(FileNotFoundError):
        ahead.read("bad")
    assert [ahead.read(path) for path in ("c", "b", "a", "b", "other")] == [b"c", b"b", b"a", b"b", b"other"]


def test_a_worker_gets_its_files_alone_and_of_this_process_memory_their_bytes(memory):
    url, files = memory
    files.pipe({f"{url}/{number}.jpg": b"%d" % number for number in range(500)})
    source = ObjectSource(Url(url))
    assert len(source.list_files().images) == 500
    job = source.narrowed(["3.jpg", "4.jpg", "none.jpg"])
    there = pickle.loads(sent := pickle.dumps(job))
    files.rm(url, recursive=True)
    assert len(sent) < 4000 and (there.read("4.jpg"), there.read("3.jpg", 0)) == (b"4", b"")
    with pytest.raises(FileNotFoundError):
        there.read("none.jpg")
    assert len(pickle.dumps(ObjectSource(Url("s3://b/x")).narrowed(["3.jpg", "4.jpg"]))) < 1000


def test_large_files_are_not_read_ahead(monkeypatch):
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 1000)
    source = Waiting(1)
    ahead = ReadAhead(source, tuple("x" * 600 + str(number) for number in range(20)))
    for number in range(10):
        ahead.read("x" * 600 + str(number))
    assert len(source.reads) == 10


def test_files_that_are_read_here_and_there_are_not_read_ahead():
    ahead = ReadAhead(source := Waiting(1), tuple(map(str, range(100))))
    assert [ahead.read(path) for path in ("50", "20", "90")] == [b"50", b"20", b"90"]
    assert sorted(source.reads) == ["20", "50", "90"]


def test_tars_in_memory_are_not_adopted(tmp_path, memory):
    url = put(memory, write_tar(tmp_path / "a.tar", samples(3)))
    with pytest.raises(InputError, match="ends with this process; say --set tars=rewrite"):
        ingest(url, tmp_path / "dataset", CONFIG)
    assert ingest(url, tmp_path / "dataset", CONFIG.model_copy(update={"tars": "rewrite"})).samples == {"train": 3}


def test_each_image_behind_a_url_is_one_request(tmp_path, folder, s3, monkeypatch):
    requests = []

    def counted(where, offset, size):
        requests.append(size)
        return locations.read_range(where, offset, size)

    monkeypatch.setattr(archives, "read_range", counted)
    monkeypatch.setattr(objects, "read_range", counted)
    files = files_in(folder / "bee")
    for source in (
        ArchiveSource(archives_at([Url(put(s3, write_zip(tmp_path / "a.zip", files, 8)))])),
        ObjectSource(Url(put(s3, folder / "bee", "bee"))),
    ):
        paths = source.list_files().images.paths
        requests.clear()
        job = source.narrowed(paths)
        assert {path: job.read(path) for path in paths} == dict(files)
        assert len(requests) == len(files)
