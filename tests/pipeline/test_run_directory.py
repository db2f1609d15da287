"""The run directory: verdicts from exit records, and checkpoints that count only when they verify."""

import json
import resource

import pytest

from pipeline.errors import InputError
from pipeline.run_directory import RunDirectory, write_json
from pipeline.supervision.judgement import ExitRecord, verdict_of


def record(rank: int, code: int, reason: str = "because") -> ExitRecord:
    return ExitRecord(rank, code, reason)


@pytest.mark.parametrize(
    ("records", "codes", "code", "words"),
    [
        ([record(0, 0), record(1, 0)], {0: 0, 1: 0}, 0, "done"),
        ([record(0, 75), record(1, 75)], {0: 75, 1: 75}, 75, "because"),
        ([record(0, 76, "a collective broke"), record(1, 1, "ValueError: x")], {0: 76, 1: 1}, 1, "rank 1: ValueError"),
        ([record(0, 76, "a collective broke")], {0: 76, 1: -9}, 76, "rank 1 was killed by signal 9"),
        ([record(0, 76, "a collective broke"), record(1, 76)], {0: 76, 1: 76}, 76, "rank 1: because"),
        ([record(0, 2, "no data"), record(1, 2)], {0: 2, 1: 2}, 2, "rank 0: no data"),
        ([], {0: 137, 1: 137}, 76, "rank 0 ended with code 137"),
    ],
)
def test_one_verdict_comes_from_the_ranks_own_records(records, codes, code, words):
    verdict = verdict_of(records, codes)
    assert verdict[0] == code and words in verdict[1]


def committed(run: RunDirectory, step: int, content: bytes = b"12345678") -> None:
    directory = run.checkpoints / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "rank-00000-of-00001.safetensors").write_bytes(content)
    write_json(directory / "manifest.json", {"step": step, "files": {"rank-00000-of-00001.safetensors": {"bytes": 8}}})


def test_the_newest_checkpoint_is_the_newest_that_verifies(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.newest_checkpoint() is None
    for step in (10, 20, 100):
        committed(run, step)
    (run.checkpoints / "step-00000200.attempt-01.partial").mkdir()
    assert run.newest_checkpoint().step == 100
    (run.checkpoints / "step-00000100" / "rank-00000-of-00001.safetensors").write_bytes(b"123")
    assert run.newest_checkpoint().step == 20
    (run.checkpoints / "step-00000020" / "manifest.json").unlink()
    assert run.newest_checkpoint().step == 10


def test_a_run_is_known_by_its_path_and_a_folder_without_a_config_is_none(tmp_path):
    assert RunDirectory(tmp_path / "a").key == RunDirectory(str(tmp_path / "a")).key != RunDirectory(tmp_path / "b").key
    with pytest.raises(InputError, match="not a run directory"):
        RunDirectory(tmp_path).require()


def test_the_current_attempt_is_the_one_the_job_file_names(tmp_path):
    run = RunDirectory(tmp_path)
    assert (run.current_attempt(), run.last_attempt()) == (0, 0)
    (tmp_path / "job.json").write_text(json.dumps({"attempt": 3}))
    run.attempt(2).make()
    assert (run.current_attempt(), run.last_attempt()) == (3, 2)


@pytest.mark.parametrize(
    ("records", "code", "words"),
    [
        ([record(0, 76, "a collective broke: timed out")], 76, "rank 1 hung"),
        ([record(0, 1, "ValueError: x")], 1, "rank 0: ValueError: x"),
        ([record(0, 75)], 76, "rank 1 hung"),
    ],
)
def test_a_hang_is_the_reason_where_no_rank_has_an_exception_of_its_own(records, code, words):
    assert verdict_of(records, {0: records[0].code}, hang="rank 1 hung") == (code, words)


def test_a_file_that_finds_no_room_is_named_and_leaves_nothing(tmp_path):
    run, (soft, hard) = RunDirectory(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: '{run.plan_file}'"):
            write_json(run.plan_file, {"ranks_per_node": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
