"""Which checkpoint a run goes on from, found by real ranks that each read a part of it."""

import io
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoints.mirror import CheckpointMirror
from pipeline.errors import InputError
from pipeline.rank import Rank
from pipeline.run_directory import RunDirectory
from tests.pipeline.checkpoints.prepared import SAVED, prepared_run
from tests.ranks import run_on_ranks

RANK_FILE = "rank-00001-of-00002.safetensors"

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run with three checkpoints."""
    run = prepared_run(tmp_path / "run")
    for step in (4, 8, 12):
        directory = run.checkpoints / f"step-{step:08d}"
        shutil.copytree(SAVED, directory)
        manifest = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").write_text(json.dumps(manifest | {"step": step}))
    return run


def found_on_ranks(path: str, mirror: str | None = None) -> tuple[int | str | None, str]:
    """The step, or the error, that each rank finds, and what it logs."""
    from pipeline.checkpoints.resuming import newest_intact_checkpoint
    from pipeline.meeting import open_store

    run, rank, world_size = RunDirectory(path), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    me, said = Rank(run, run.attempt(1), rank, rank, world_size), io.StringIO()
    logging.basicConfig(stream=said, level=logging.WARNING, force=True)
    try:
        checkpoint = newest_intact_checkpoint(me, open_store(me), mirror)
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
            assert "none of its checkpoints is intact" in answer and "No such file or directory" in answer
    shutil.rmtree(run.checkpoints)
    assert run_on_ranks(found_on_ranks, 2, str(run.path)) == [(None, "")] * 2


def test_a_format_of_the_future_is_refused_and_not_passed_over(run):
    manifest = json.loads((run.checkpoints / "step-00000012" / "manifest.json").read_text())
    (run.checkpoints / "step-00000012" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    assert "format_version 2: this program reads up to 1" in run_on_ranks(found_on_ranks, 1, str(run.path))[0][0]


def test_where_all_are_damaged_an_intact_copy_comes_back_and_they_are_set_aside(run, tmp_path):
    url = f"file://{tmp_path / 'mirror'}"
    mirror = CheckpointMirror(url, run)
    mirror.copy(run.committed_checkpoints()[1])
    mirror.wait()
    for step in (4, 8, 12):
        flip_a_byte(run.checkpoints / f"step-{step:08d}" / RANK_FILE)
    assert [step for step, _ in run_on_ranks(found_on_ranks, 2, str(run.path), url)] == [8, 8]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "step-00000004.damaged", "step-00000008", "step-00000008.damaged", "step-00000012.damaged"
    ]  # fmt: skip


def test_where_all_are_damaged_and_the_mirror_has_none_nothing_is_touched(run, tmp_path):
    names = sorted(run.checkpoints.iterdir())
    for directory in names:
        flip_a_byte(directory / RANK_FILE)
    for answer, _ in run_on_ranks(found_on_ranks, 2, str(run.path), f"file://{tmp_path / 'mirror'}"):
        assert "none of its checkpoints is intact" in answer
    assert sorted(run.checkpoints.iterdir()) == names


def test_the_checkpoint_of_another_run_is_refused_by_every_rank_here_and_in_the_mirror(run, tmp_path):
    url = f"file://{tmp_path / 'mirror'}"
    mirror = CheckpointMirror(url, run)
    mirror.copy(run.newest_checkpoint())
    mirror.wait()
    other = prepared_run(tmp_path / "elsewhere" / "run", "encoder.depth=2")
    answers = run_on_ranks(found_on_ranks, 2, str(other.path), url)
    shutil.copytree(run.checkpoints, other.checkpoints)
    for answer, _ in answers + run_on_ranks(found_on_ranks, 2, str(other.path)):
        assert f"belongs to another run than {other.path} (its encoder.depth differs)" in answer


def test_a_mirror_that_cannot_be_read_is_the_wrong_input_that_it_is(run):
    shutil.rmtree(run.checkpoints)
    for answer, _ in run_on_ranks(found_on_ranks, 2, str(run.path), "foo://bucket"):  # InputError, not FaultError
        assert "foo:// cannot be read here" in answer
