"""What a person sees of a job: what its ranks do until the first step is made, and its steps from then on."""

import json

from flows.command_line.runs import runs_command
from flows.control import progress
from flows.control.progress import LedgerTail, ingest_progress
from pipeline.progress import Progress
from pipeline.run_directory import RunDirectory, write_json


def test_until_the_first_step_the_rank_that_is_furthest_behind_is_told_of(tmp_path):
    run = RunDirectory(tmp_path)
    write_json(run.plan_file, {"steps": {"steps": 8}, "ranks_per_node": 2, "compile_backend": None})
    attempt = run.attempt(1).make()
    tail = LedgerTail(run, 1)
    assert tail.lines() == []
    ranks = [Progress(attempt.progress(rank)) for rank in range(2)]
    told = []
    for rank, phase in ((0, ""), (0, "data"), (1, "data"), (1, "model"), (0, "model"), (0, "train"), (1, "train")):
        if phase:
            ranks[rank].enter(phase)
        told += tail.lines()
    for rank in ranks:
        rank.step = 0
    told += tail.lines() + tail.lines()
    assert [line.rpartition(": ")[2] for line in told] == [
        "loading the libraries", "opening the data", "making the model", "making the first step",
    ]  # fmt: skip
    assert told[0].startswith("starting, 0 s: ")
    figures = {"perf/images_per_second": 5.0, "perf/data_wait_share": 0.0, "perf/seconds_left": 7.0, "train/loss": 2.0}
    attempt.ledger.write_text(json.dumps({"step": 1} | figures) + "\n")
    (line,) = tail.lines()
    assert line.startswith("step 1/8  loss 2.0000") and tail.lines() == []
    with open(attempt.events, "w") as events:
        print("saved step-00000001", file=events)
        events.write("half a li")
        events.flush()
        assert tail.lines() == ["saved step-00000001"] and tail.lines() == []
        print("ne", file=events)
    assert tail.lines() == ["half a line"]


def test_the_list_of_runs_says_which_state_of_a_run_was_the_best(home):
    best = {"step": 40, "directory": "/x", "metric": "validation/accuracy", "value": 0.91}
    for name, result in (("scored", {"best": best}), ("unscored", {"best": None}), ("older", {})):
        run = RunDirectory(home / "runs" / name)
        run.path.mkdir(parents=True)
        run.config_file.write_text("stage: pretrain\n")
        write_json(run.result_file, result)
    lines: list[str] = []
    runs_command(str(home), lines.append)
    (told,) = [line for line in lines if "best" in line]
    assert told.startswith("scored ") and told.endswith("best validation/accuracy 0.9100 at step 40")
    assert len(lines) == 3


def test_each_thing_that_an_ingestion_counts_has_a_line_and_a_speed_of_its_own(monkeypatch):
    told, clock = [], iter(range(0, 100, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    show = ingest_progress(told.append)  # 0 s
    show(0, 8, 0, "listing tables")
    show(2, 8, 0, "listing tables")  # 20 s
    show(100, 300, 0)
    show(200, 300, 1)  # 40 s
    assert told == [
        "2 of 8, listing tables  30 s left",
        "200 of 300 images  10 images/s  1 rejected  10 s left",
    ]
