"""What `vit ingest` says, and its exit codes."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from flows.cli import ingest
from flows.command_line.commands import ingest_command
from pipeline.config.ingest import IngestConfig
from pipeline.shards.check import check_dataset
from tests.pipeline.pictures import write_pictures

NAMES = [f"{kind}/{number:03d}.jpg" for kind in ("ant", "bee") for number in range(300)]
ONE_SPLIT = ["split_fractions={train: 1.0}", "samples_per_shard=2", "workers=1"]


class Said(list):
    def __call__(self, line: str, *, error: bool = False) -> None:
        self.append(line)


def signal_after_lines(journal: str, lines: int, number: int) -> threading.Thread:
    def watch() -> None:
        for _ in range(3000):
            if os.path.exists(journal) and open(journal, "rb").read().count(b"\n") >= lines:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.fixture
def heard():
    """Ctrl-C is: who was started behind `&` in a script ignores it from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_says_what_stays_and_the_same_command_goes_on(tmp_path, number):
    source, dest, said = str(write_pictures(tmp_path / "source", NAMES)), str(tmp_path / "dataset"), Said()
    before = signal.getsignal(signal.SIGTERM)
    thread = signal_after_lines(f"{dest}/.ingest.jsonl", 4, number)
    assert ingest_command(source, dest, ONE_SPLIT, said) == 75
    thread.join()
    assert said[-1].startswith("stopped: nothing is published") and said[-1].endswith("the same command goes on")
    assert " of 300 shards are finished" in said[-1] and signal.getsignal(signal.SIGTERM) == before
    assert ingest_command(source, dest, ONE_SPLIT, said) == 0
    assert " 0 kept" not in said[-2] and check_dataset(dest, full=False) == []


def test_past_the_budget_it_says_that_nothing_is_published_and_what_stays(tmp_path):
    source, dest, said = write_pictures(tmp_path / "source", NAMES[:8]), tmp_path / "dataset", Said()
    (source / "ant/broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert ingest_command(str(source), str(dest), ["split_fractions={train: 1.0}"], said) == 1
    assert f"nothing is published ({dest} has no index.json); 1 of 1 shards are finished" in said[-1]


def test_help_and_readme_name_every_key():
    keys = [key for key in IngestConfig.model_fields if key != "split"] + ["split.group"]
    help_text, readme = ingest.__doc__, Path("README.md").read_text()
    table = readme[readme.index("| `--set` |") :].partition("\n\n")[0]
    assert not [key for key in keys if not re.search(rf"\b{re.escape(key)}\b", help_text)]
    assert not [key for key in keys if not re.search(rf"[`']{re.escape(key)}=", table)]
