"""One run on two nodes, which are two supervisors of this machine: to the end, stopped, resumed, lost, cut off."""

import json
import re
import signal
import time

import pytest

from pipeline.checkpoints.files import read_weights
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_FAULT, EXIT_STOPPED
from pipeline.run_directory import RunDirectory, read_json
from tests.pipeline.training.runs import BATCH, STEPS, new_run, recorded
from tests.pipeline.training.supervised import supervise
from tests.pipeline.training.two_nodes import Nodes, has_committed, run_for_nodes, until

HANG_SECONDS = 6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory) -> RunDirectory:
    """The same run in two ranks of one node."""
    run = new_run(tmp_path_factory.mktemp("whole"), str(pictures), "zero.stage=2")
    assert supervise(run)[0] == EXIT_DONE
    return run


def test_two_nodes_train_to_the_end_what_one_would(uninterrupted, pictures, tmp_path):
    run = run_for_nodes(tmp_path, pictures, "zero.stage=2")
    with Nodes(run, "7.0") as nodes:
        assert nodes.wait() == [EXIT_DONE, EXIT_DONE]
    assert nodes.verdict() == (EXIT_DONE, "attempt 1: done")
    attempt = run.attempt(1)
    verdict = attempt.verdict()
    assert (verdict["code"], verdict["node"], verdict["step"]) == (EXIT_DONE, None, STEPS)
    job = read_json(run.job_file)
    assert (job["attempt"], job["start"], job["host"]) == (1, "7.0", "localhost")
    assert not attempt.progress(0).exists()
    for node in (0, 1):
        beat = json.loads(attempt.heartbeat(node).read_text())
        assert beat["node"] == node and [*beat["positions"]] == [*beat["ranks"]] == [str(node)]
    assert recorded(run) == recorded(uninterrupted)
    ours, theirs = (read_weights(one.newest_checkpoint()) for one in (run, uninterrupted))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_stop_reaches_every_process_and_the_run_goes_on_on_one_node_and_then_on_two(pictures, tmp_path):
    run = run_for_nodes(tmp_path, pictures, "zero.stage=2", "steps=60", "checkpoint.every_steps=1000")
    for start, count in (("7.0", 2), ("7.1", 1)):
        with Nodes(run, start, count) as nodes:
            attempt = run.last_attempt() + 1
            until(lambda number=attempt: _steps(run, number) > 3, "the third step")
            for number in range(count):
                for process in nodes.tree(number):
                    process.send_signal(signal.SIGUSR1 if count == 2 else signal.SIGTERM)
            assert nodes.wait() == [EXIT_STOPPED] * count
        code, said = nodes.verdict()
        assert code == EXIT_STOPPED and said.endswith("of 60, checkpoint complete"), said
        plan = run.plan()
        assert (plan["nodes"], plan["world_size"], plan["nodes_range"]) == (count, count, [1, 2])
        assert plan["batches"]["gradient_accumulation_steps"] == BATCH // 2 // count
        assert read_json(run.path / "deepspeed.json")["gradient_accumulation_steps"] == BATCH // 2 // count
    with Nodes(run, "7.2") as nodes:
        assert nodes.wait() == [EXIT_DONE, EXIT_DONE]
    assert run.plan()["nodes"] == 2 and nodes.verdict()[0] == EXIT_DONE
    positions = sorted(position for position, _ in recorded(run))
    assert positions == list(range(60 * BATCH))


def _steps(run: RunDirectory, attempt: int) -> int:
    ledger = run.attempt(attempt).ledger
    return len(ledger.read_text().splitlines()) if ledger.exists() else 0


def test_a_node_that_is_killed_with_its_ranks_is_named_and_the_other_ends(pictures, tmp_path):
    run = run_for_nodes(tmp_path, pictures, "zero.stage=2", "steps=100000", "checkpoint.every_steps=5")
    with Nodes(run, "7.0") as nodes:
        until(lambda: has_committed(run, 5), "a checkpoint")
        for process in nodes.tree(1):
            process.kill()
        assert nodes.supervisors[0].wait(30) == EXIT_FAULT
    code, said = nodes.verdict()
    assert code == EXIT_FAULT
    assert said == (
        "attempt 1: node 1 (localhost) was lost: its supervisor left no verdict (node to avoid: localhost)"
    )  # fmt: skip
    verdict = run.attempt(1).verdict()
    assert verdict["node"] == "localhost" and verdict["step"] == run.newest_checkpoint().step >= 5


@pytest.mark.parametrize(
    ("strike", "code", "words", "avoid"),
    [
        ("hang", EXIT_FAULT, r"rank 1 hung in forward of step 5 for \d+ s: .*in hang", "localhost"),
        ("kill", EXIT_FAULT, "rank 1 was killed by signal 9 in forward of step 5, without an exit record", "localhost"),
        ("fail", EXIT_FAILED, "rank 1: ValueError: the first exception", None),
    ],
)
def test_what_ends_a_rank_of_another_node_is_said_by_that_node(strike, code, words, avoid, pictures, tmp_path):
    run = run_for_nodes(tmp_path, pictures)
    environment = {"VIT_COLLECTIVE_TIMEOUT_SECONDS": str(HANG_SECONDS), "FAULT": f"1 forward 4 {strike}"}
    with Nodes(run, "7.0", module="tests.pipeline.training.faulty_node", **environment) as nodes:
        assert nodes.wait() == [EXIT_FAULT, code]
    attempt = run.attempt(1)
    if strike == "hang":
        assert time.time() - json.loads(attempt.ledger.read_text().splitlines()[-1])["time"] < HANG_SECONDS + 10
    first, second = attempt.node_verdicts()
    assert re.match(words, second["reason"]) and not (first["hang"] and first["hang"]["certain"])
    assert nodes.verdict()[0] == code
    verdict = attempt.verdict()
    assert re.match(words, verdict["reason"]) and verdict["node"] == avoid


def test_a_start_that_was_cut_off_neither_commits_nor_takes_the_run_back(pictures, tmp_path):
    run = run_for_nodes(tmp_path, pictures, "steps=100000", "checkpoint.every_steps=5", nodes=1)
    with Nodes(run, "7.0", 1) as cut_off:
        until(lambda: has_committed(run, 5), "a checkpoint")
        for process in cut_off.tree(0):
            process.send_signal(signal.SIGSTOP)  # as seen from the other side of a network that is cut
        with Nodes(run, "7.1", 1) as newer:
            until(lambda: run.current_attempt() == 2, "the second attempt")
            for process in cut_off.tree(0):
                process.send_signal(signal.SIGCONT)
            assert cut_off.wait() == [EXIT_FAULT]
            assert "attempt 1 was replaced by attempt 2; it may not commit" in cut_off.supervisors[0].stderr.read()
            step = run.newest_checkpoint().step
            until(lambda: has_committed(run, step + 5), "a checkpoint of the newer start")
            with Nodes(run, "7.0", 1) as late:
                assert late.wait() == [EXIT_FAULT]
                assert "start 7.0 was replaced by 7.1; it leaves the run alone" in late.supervisors[0].stderr.read()
            assert (run.current_attempt(), run.last_attempt()) == (2, 2)
            newer.supervisors[0].terminate()
            assert newer.wait() == [EXIT_STOPPED]
    assert cut_off.verdict()[0] == EXIT_FAULT and newer.verdict()[0] == EXIT_STOPPED


def test_a_node_that_falls_silent_is_missed_by_the_one_before_it(pictures, tmp_path):
    run = run_for_nodes(tmp_path, pictures, "steps=100000", "checkpoint.every_steps=5")
    with Nodes(run, "7.0", VIT_COLLECTIVE_TIMEOUT_SECONDS=str(HANG_SECONDS)) as nodes:
        until(lambda: has_committed(run, 5), "a checkpoint")
        silent = nodes.tree(1)
        for process in silent:
            process.send_signal(signal.SIGSTOP)  # as by a power cut: its connections stay open
        nodes.supervisors[0].send_signal(signal.SIGTERM)  # as the cluster does once it knows
        assert nodes.supervisors[0].wait(60) == EXIT_FAULT
        for process in silent:
            process.kill()
    reason = run.attempt(1).verdict()["reason"]
    assert reason.startswith("node 1 (localhost) was lost: not heard of for "), reason
    assert nodes.verdict() == (EXIT_FAULT, f"attempt 1: {reason} (node to avoid: localhost)")
