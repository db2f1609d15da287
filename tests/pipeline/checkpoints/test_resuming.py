"""Which checkpoint a run goes on from, found by real ranks that each read a part of it."""

import io
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.rank import Rank
from pipeline.run_directory import RunDirectory
from tests.ranks import run_on_ranks

SAVED = Path(__file__).parents[2] / "golden" / "checkpoint_format_1" / "step-00000004"
RANK_FILE = "rank-00001-of-00002.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run with three checkpoints."""
    for step in (4, 8, 12):
        directory = tmp_path / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(SAVED, directory)
        manifest = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
    return RunDirectory(tmp_path)


def found_on_ranks(path: str) -> tuple[int | str | None, str]:
    """The step, or the error, that each rank finds, and what it logs."""
    from pipeline.checkpoints.resuming import newest_intact_checkpoint
    from pipeline.meeting import open_store

    run, rank, world_size = RunDirectory(path), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    me, said = Rank(run, run.attempt(1), rank, rank, world_size), io.StringIO()
    logging.basicConfig(stream=said, level=logging.WARNING, force=True)
    try:
        checkpoint = newest_intact_checkpoint(me, open_store(me))
    except InputError as error:
        return str(error), said.getvalue()
    return checkpoint and checkpoint.step, said.getvalue()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_flipped_byte_and_a_cut_file_send_all_ranks_back_to_the_one_before(run, ranks):
    assert run_on_ranks(found_on_ranks, ranks, str(run.path)) == [(12, "")] * ranks
    flip_a_byte(run.checkpoints / "step-00000012" / RANK_FILE)
    os.truncate(run.checkpoints / "step-00000008" / RANK_FILE, 1000)
    answers = run_on_ranks(found_on_ranks, ranks, str(run.path))
    assert [step for step, _ in answers] == [4] * ranks
    said = answers[0][1]
    assert f"step-00000012 is damaged, falling back to the one before: {RANK_FILE}: its bytes are not those" in said
    assert f"step-00000008 is damaged, falling back to the one before: {RANK_FILE}: 1000 bytes, its manifest" in said
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "step-00000004", "step-00000008.damaged", "step-00000012.damaged"
    ]  # fmt: skip


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_unasked(run):
    for step in (4, 8, 12):
        (run.checkpoints / f"step-{step:08d}" / RANK_FILE).unlink()
    for _ in range(2):
        for answer, _ in run_on_ranks(found_on_ranks, 2, str(run.path)):
            assert "none of its 3 checkpoints is intact" in answer and "No such file or directory" in answer
    shutil.rmtree(run.checkpoints)
    assert run_on_ranks(found_on_ranks, 2, str(run.path)) == [(None, "")] * 2


def test_a_format_of_the_future_is_refused_and_not_passed_over(run):
    manifest = json.loads((run.checkpoints / "step-00000012" / "manifest.json").read_text())
    (run.checkpoints / "step-00000012" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    assert "format_version 2: this program reads up to 1" in run_on_ranks(found_on_ranks, 1, str(run.path))[0][0]
