"""What a run consumes, from recorded ids: one sequence, whatever stops it and however many ranks go on.

Real DeepSpeed ranks over gloo, real shards, damaged where a test says so.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import webdataset as wds
import yaml

from flows import profiles
from flows.requests.training import prepared_training
from pipeline.config.ingest import IngestConfig
from pipeline.errors import EXIT_FAILED, EXIT_FAULT, InputError
from pipeline.ingestion.build import ingest
from pipeline.preparation.resume import change_run
from pipeline.rank import Rank, Stopped
from pipeline.run_directory import RunDirectory
from pipeline.shards.index import read_index
from pipeline.shards.table import read_table
from tests.pipeline.pictures import encoded, picture, small_dataset
from tests.pipeline.training.runs import BATCH, STEPS, new_run, recorded, train_until
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow


def test_three_interruptions_and_other_world_sizes_leave_the_sequence_as_it_was(pictures, tmp_path):
    whole = new_run(tmp_path / "whole", str(pictures))
    assert run_on_ranks(train_until, 2, str(whole.path), 1, STEPS + 1) == ["done"] * 2
    expected = recorded(whole)
    assert [position for position, _ in expected] == list(range(STEPS * BATCH))
    for epoch in range(2):
        assert len({key for _, key in expected[epoch * 108 : (epoch + 1) * 108]}) == 108
    assert expected[0][1] != expected[108][1] or expected[1][1] != expected[109][1]

    seed = random.randrange(1 << 30)
    draw = random.Random(seed)
    stops = [*sorted(draw.sample(range(1, 9), 2)), draw.randrange(10, 17), STEPS + 1]
    run = new_run(tmp_path / "interrupted", str(pictures))
    for attempt, (ranks, stop_at) in enumerate(zip((2, 1, 2, 3), stops, strict=True), start=1):
        profile, placement = profiles.changed_profile(run.profile_file, [f"ranks_per_node={ranks}"])
        change_run(run, [], profile, placement)
        answers = run_on_ranks(train_until, ranks, str(run.path), attempt, stop_at)
        assert set(answers) == {"done" if stop_at > STEPS else f"stopped on request at step {stop_at} of {STEPS}, "
                                "checkpoint complete"}, f"seed {seed}"  # fmt: skip
    assert recorded(run) == expected, f"seed {seed}, stops {stops}"


def test_a_mixture_and_what_is_passed_over_are_resumed_too(pictures, tmp_path):
    small_dataset(tmp_path, per_class=15, samples_per_shard=4, split_fractions={"train": 1.0}, seed=3)
    data = [f"{pictures}=3", f"{tmp_path / 'dataset'}=1"]
    skips = "data.skipped=[[24,48],[60,72]]"
    whole = new_run(tmp_path / "whole", data, skips, ranks=1)
    assert run_on_ranks(train_until, 1, str(whole.path), 1, STEPS + 1) == ["done"]
    run = new_run(tmp_path / "interrupted", data, skips)
    run_on_ranks(train_until, 2, str(run.path), 1, 3)
    manifest = run.newest_checkpoint().manifest
    assert manifest["skipped"] == [[24, 48], [60, 72]]
    assert manifest["position"] == 72  # 3 batches read: 0-23, 48-59; the next is behind the second range
    run_on_ranks(train_until, 2, str(run.path), 2, STEPS + 1)
    assert recorded(run) == recorded(whole)
    positions = [position for position, _ in recorded(run)]
    assert positions == [*range(24), *range(48, 60), *range(72, STEPS * BATCH + 36)]


def launched(run: RunDirectory) -> tuple[int, str]:
    """The supervisor's exit code and verdict."""
    process = subprocess.run(
        [sys.executable, "-m", "pipeline.launch", str(run.path)], capture_output=True, text=True, timeout=200
    )
    verdict = run.attempt(run.last_attempt()).verdict()
    assert verdict["code"] == process.returncode, process.stderr
    return process.returncode, verdict["reason"]


def test_a_loader_error_on_one_rank_stops_all_and_names_rank_shard_and_key(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    run = new_run(tmp_path, str(data), "data.verify=full")
    position, key = sorted(_consumed_by_rank(run, data, rank=1))[40]
    shard = _damage(data, key)
    code, reason = launched(run)
    assert code == EXIT_FAILED
    assert reason.startswith("rank 1: DataError: ") and shard in reason and f"sample `{key}" in reason
    exits = [json.loads(path.read_text()) for path in sorted(run.path.glob("attempts/01/exit/rank-*.json"))]
    assert [record["code"] for record in exits] == [EXIT_FAULT, EXIT_FAILED]
    assert exits[1]["step"] == position // BATCH
    ended = [path.stat().st_mtime for path in sorted(run.path.glob("attempts/01/exit/rank-*.json"))]
    assert abs(ended[0] - ended[1]) < 20


def _consumed_by_rank(run: RunDirectory, data: Path, rank: int) -> list[tuple[int, str]]:
    """(position, key) of the first epoch that falls to a rank of two, from the order itself."""
    from pipeline.config.stages import read_run_config
    from pipeline.loading.stream import SampleStream
    from pipeline.shards.order import positions_of_rank

    stream = SampleStream(read_run_config(run.path), [read_index(data)])
    found = []
    for step in range(9):
        for position in positions_of_rank(BATCH, step, rank, 2):
            _, _, shards, samples = stream.mixture.locate(position[None])
            found.append((int(position), stream.readers[0].read(int(shards[0]), int(samples[0])).key))
    return found


def _damage(data: Path, key: str, split: str = "train") -> str:
    """Change bytes of a sample's image; its shard's name."""
    index = read_index(data)
    for shard in index.shards(split):
        table = read_table(index.table_path(shard))
        for sample in range(len(table)):
            if table.key(sample) == key:
                with open(data / shard.name, "r+b") as file:
                    file.seek(int(table.records["image_offset"][sample]) + 30)
                    file.write(b"\xff" * 8)
                return shard.name
    raise AssertionError(key)


def test_damaged_samples_within_the_budget_are_counted_and_one_more_stops(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    run = new_run(tmp_path / "within", str(data), "data.verify=full", "data.max_damaged=4", "steps=18")
    for rank in (0, 1):
        _damage(data, sorted(_consumed_by_rank(run, data, rank))[10][1])
    assert run_on_ranks(train_until, 2, str(run.path), 1, 19) == ["done"] * 2
    assert run.newest_checkpoint().manifest["damaged"] == {"missing": 0, "cut": 0, "changed": 4, "undecodable": 0}
    assert json.loads((run.path / "result.json").read_text())["metrics"]["data/damaged_changed"] == 4
    assert len(recorded(run)) == 18 * BATCH
    over = new_run(tmp_path / "over", str(data), "data.verify=full", "data.max_damaged=3", "steps=18")
    answers = run_on_ranks(train_until, 2, str(over.path), 1, 19)
    assert any("4 samples damaged, data.max_damaged allows 3" in answer for answer in answers), answers


def test_a_rank_with_another_plan_is_named_before_the_first_step(pictures, tmp_path):
    run = new_run(tmp_path / "one", str(pictures))
    other = new_run(tmp_path / "other", str(pictures), "seed=7")
    answers = run_on_ranks(_train_on_own_run, 2, [str(run.path), str(other.path)])
    for answer in answers:
        assert (
            answer.startswith("rank 1 on ") and "differs in config.yaml (" in answer and "same run directory" in answer
        )


def test_a_rank_that_sees_another_dataset_is_named_to_all(pictures, tmp_path):
    """A stale copy on one node's disk, and one that is not there."""
    run = new_run(tmp_path / "one", str(pictures))
    for what in ("stale", "missing"):
        other = new_run(tmp_path / what, str(pictures))
        if what == "stale":
            (tmp_path / "stale").mkdir(exist_ok=True)
            small_dataset(tmp_path / "stale", per_class=54, samples_per_shard=9, split_fractions={"train": 1.0}, seed=9)
        config = other.config_file.read_text()
        other.config_file.write_text(config.replace(str(pictures), str(tmp_path / what / "dataset")))
        answers = run_on_ranks(_train_on_own_run, 2, [str(run.path), str(other.path)])
        for answer in answers:
            assert answer.startswith("rank 1 on ") and f"data (refused: {tmp_path / what / 'dataset'}: " in answer


def test_a_stop_while_ranks_wait_for_one_another_is_heard(pictures, tmp_path):
    run = new_run(tmp_path, str(pictures))
    assert run_on_ranks(_wait_for_the_other, 2, str(run.path)) == ["stopped on request before the first step"] * 2


def _wait_for_the_other(path: str) -> str:
    from pipeline.meeting import open_store
    from pipeline.training.agreement import require_same_plan

    run, rank = RunDirectory(path), int(os.environ["RANK"])
    me = Rank(run, run.attempt(1).make(), rank, rank, 3)  # the third never comes
    threading.Timer(2, lambda: setattr(me, "stop_requested", True)).start()
    try:
        require_same_plan(me, open_store(me), {})
    except Stopped as stopped:
        time.sleep(2 * (1 - rank))  # rank 0 serves the store
        return str(stopped)
    return "no stop"


def _train_on_own_run(paths: list[str]) -> str:
    from pipeline.training.loop import train

    rank, run = int(os.environ["RANK"]), RunDirectory(paths[int(os.environ["RANK"])])
    begun = time.monotonic()
    try:
        train(Rank(run, run.attempt(1).make(), rank, rank, 2))
    except InputError as error:
        assert time.monotonic() - begun < 10
        return str(error)
    return "no error"


def test_the_order_of_a_dataset_made_anew_is_not_resumed(pictures, tmp_path):
    small_dataset(tmp_path, per_class=54, samples_per_shard=9, split_fractions={"train": 1.0})
    run = new_run(tmp_path, str(tmp_path / "dataset"))
    shutil.rmtree(tmp_path / "dataset")
    small_dataset(tmp_path, per_class=54, samples_per_shard=9, split_fractions={"train": 1.0}, seed=9)
    (answer,) = run_on_ranks(train_until, 1, str(run.path), 1, STEPS + 1)
    assert "the dataset changed since this run began: its shards_sha256 is" in answer


def test_yaml_of_a_mixture_holds_weights(pictures, tmp_path):
    run = new_run(tmp_path, [f"{pictures}=3", f"{pictures}=1"])
    sources = yaml.safe_load(run.config_file.read_text())["data"]["sources"]
    assert [(source["path"], source["weight"]) for source in sources] == [(str(pictures), 3.0), (str(pictures), 1.0)]


def test_foreign_tars_train_where_they_lie(tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    with wds.ShardWriter(str(tars / "foreign-%03d.tar"), maxcount=20, verbose=0) as writer:
        for number in range(45):
            writer.write({"__key__": f"sub/{number:05d}", "jpg": encoded(picture(number)), "cls": str(number % 3)})
    ingest(str(tars / "foreign-*.tar"), tmp_path / "adopted", IngestConfig())
    assert not list((tmp_path / "adopted").glob("*.tar"))
    prepared = prepared_training(
        "pretrain", "pretrain_mae_debug", data=str(tmp_path / "adopted"), placement=profiles.load_profile("local")[1],
        overrides=["data.window_shards=2"], home=tmp_path, rehearse="never", model=None,
    )  # fmt: skip
    assert any("within windows of 2 of 3 shards: where they are sorted by class" in note for note in prepared.notes)
    run = new_run(tmp_path, str(tmp_path / "adopted"), "steps=8")
    assert run_on_ranks(train_until, 2, str(run.path), 1, 9) == ["done"] * 2
    consumed = recorded(run)
    assert sorted(key for _, key in consumed[:45]) == [f"sub/{number:05d}" for number in range(45)]


def test_a_picture_that_cannot_be_drawn_decides_no_run(tmp_path):
    fractions = {"train": 0.7, "test": 0.3}
    small_dataset(tmp_path, per_class=30, samples_per_shard=9, splits="hash", split_fractions=fractions)
    index = read_index(tmp_path / "dataset")
    shard = index.shards("test")[0]
    run = new_run(tmp_path, str(tmp_path / "dataset"), "steps=2", ranks=1)
    _damage(tmp_path / "dataset", read_table(index.table_path(shard)).key(0), split="test")
    assert run_on_ranks(train_until, 1, str(run.path), 1, 3) == ["done"]
    assert run.result_file.exists() and not (run.path / "reconstructions.png").exists()
