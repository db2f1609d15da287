"""What an ingestion of very many files takes of memory and time."""

import gc
import json
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion import plan
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.journal import JOURNAL_NAME, open_journal
from pipeline.ingestion.shard_contract import ShardSummary
from pipeline.ingestion.sources.listing import Listing, SourceFile, SourceFiles
from pipeline.ingestion.statistics import ImageTotals
from tests.pipeline.ingestion.many_files import listed

ROOT = Path(__file__).parents[3]


def test_a_plan_holds_little_more_than_the_paths_of_its_files(monkeypatch, tmp_path):
    num_files = 50_000
    monkeypatch.setattr(plan, "list_source", lambda *_: listed(num_files))
    gc.collect()
    tracemalloc.start()
    try:
        made = plan.plan_ingest("/many", IngestConfig(), Scratch(tmp_path))
        held, peak = tracemalloc.get_traced_memory()
        keys = {job.key() for job in made.jobs}
        _, peak_of_keys = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(keys) == len(made.jobs) == 50 and made.num_files == num_files
    assert held / num_files < 200 and peak / num_files < 600  # 100 bytes of it are the path
    assert peak_of_keys <= peak + (1 << 22)  # jobs are made when they are asked for


def test_stamps_of_any_kind_are_kept():
    files = [SourceFile("b", 1, 5), SourceFile("a", 2, "an etag"), SourceFile("c", 3, 1 << 90)]
    listing = Listing(files)
    assert isinstance(listing.images, SourceFiles) and list(listing.images) == files and listing.images[1:] == files[1:]


@pytest.mark.slow
def test_the_journal_of_very_many_shards_is_read_in_seconds(tmp_path):
    with open_journal(tmp_path, {"source": "/many"}) as journal:
        journal.add("key", ShardSummary("train-000000.tar", "train", 1000, None, "0" * 64, ImageTotals()))
    header, line = (tmp_path / JOURNAL_NAME).read_bytes().splitlines(keepends=True)
    lines = (line.replace(b"000000.tar", b"%06d.tar" % number) for number in range(100_000))
    (tmp_path / JOURNAL_NAME).write_bytes(header + b"".join(lines))
    started = time.process_time()
    with open_journal(tmp_path, {"source": "/many"}) as journal:
        assert all(journal.finished(f"train-{number:06d}.tar", "key") for number in range(100_000))
    assert time.process_time() - started < 20


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_million_files_take_less_than_two_gibibytes(tmp_path):
    command = [sys.executable, "-m", "tests.pipeline.ingestion.many_files", "1000000", tmp_path / "dataset"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found["peak_bytes"] < 2 << 30 and found["peak_bytes_of_children"] < 1 << 30, found
    assert found["seconds"][1] < 60, found  # of a second run, which writes nothing
