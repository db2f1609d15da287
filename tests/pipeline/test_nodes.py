"""Nodes of one start: their places, their meeting, which start is the newer, and one verdict of all of them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_FAULT, EXIT_STOPPED, FaultError, InputError
from pipeline.progress import Position
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.supervision.judgement import OUT_OF_MEMORY, ExitRecord, Hang, NodeVerdict, merged_verdict
from pipeline.supervision.liveness import beat
from pipeline.supervision.nodes import (
    Node,
    Peers,
    expanded_hosts,
    join,
    lead,
    lost_seconds,
    name_attempt,
    newer_start,
    positions_of,
)
from pipeline.verdict import concluded
from tests.pipeline.training.two_nodes import Nodes

FIRST, SECOND = (Node(number, 2, "7.0", host) for number, host in enumerate(("a1", "a2")))
HOSTS = {0: "a1", 1: "a2"}


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.config_file.touch()
    write_json(
        run.plan_file,
        {"stage": "pretrain", "ranks_per_node": 1, "world_size": 2, "nodes": 2, "accelerators_per_node": 0},
    )
    return run


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("", ()),
        ("node7", ("node7",)),
        ("a[01-03,7],b", ("a01", "a02", "a03", "a7", "b")),
        ("x-1,y[9-10]", ("x-1", "y9", "y10")),
    ],
)
def test_a_node_list_is_read_as_slurm_writes_it(words, names):
    assert expanded_hosts(words) == names


def test_a_place_comes_from_slurm_else_kubernetes_else_is_that_of_one_node():
    of_slurm = {"VIT_START": "7.0", "SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a[1-2]"}
    node = Node.here(of_slurm, 4)
    assert (node.number, node.count, node.start, node.hosts) == (1, 2, "7.0", ("a1", "a2"))
    node = Node.here({"VIT_START": "u-1", "JOB_COMPLETION_INDEX": "3"}, 4)
    assert (node.number, node.count, node.start) == (3, 4, "u-1")
    node = Node.here(of_slurm | {"VIT_ATTEMPT": "3"}, 1)  # a controller in an allocation
    assert (node.number, node.count, node.start) == (0, 1, "")
    node = Node.here({"SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2"}, 2)  # a shell inside an allocation
    assert (node.number, node.count, node.start) == (0, 1, "")


@pytest.mark.parametrize(
    ("job", "start", "newer"),
    [
        ({}, "7.0", None),
        ({"kind": "slurm", "id": "7", "start": "6.3"}, "7.0", None),
        ({"kind": "slurm", "id": "7", "start": "7.1"}, "7.0", "7.1"),
        ({"kind": "slurm", "id": "7", "start": "7.0"}, "7.1", None),
        ({"kind": "slurm", "id": "8", "start": "7.0"}, "7.0", "job 8"),
        ({"kind": "slurm", "id": "7", "start": "900.0"}, "7.0", None),  # moved to a cluster that counts lower
        ({"kind": "by hand", "id": "4711:12.5", "start": "9.0"}, "7.0", "9.0"),
        ({"kind": "local", "id": "4711:12.5"}, "7.0", None),
        ({"kind": "kubernetes", "id": "uid", "start": "u-2"}, "u-1", None),
    ],
)
def test_which_start_is_the_newer(job, start, newer):
    assert newer_start(job, start) == newer


def test_node_0_takes_the_next_attempt_and_the_others_find_it(run):
    write_json(run.job_file, {"kind": "slurm", "id": "7", "key": "k", "attempt": 0, "comment": "kept"})
    led = lead(run, FIRST, 1)
    joined = join(run, SECOND)
    assert (led.attempt.number, led.address) == (1, "a1")
    assert (joined.attempt.path, joined.address, joined.port) == (led.attempt.path, led.address, led.port)
    job = read_json(run.job_file)
    assert (job["attempt"], job["start"], job["host"], job["comment"], job["id"]) == (1, "7.0", "a1", "kept", "7")
    with pytest.raises(InputError, match="node 0 counts 2 nodes and node 1 3; start all supervisors in one job step"):
        join(run, Node(1, 3, "7.0", "a2"))
    for late in (lambda: lead(run, Node(0, 2, "6.9", "a3"), 1), lambda: join(run, Node(1, 2, "6.9", "a3"))):
        with pytest.raises(FaultError, match=r"start 6.9 was replaced by job 7; it leaves the run alone"):
            late()
    assert (run.last_attempt(), run.current_attempt()) == (1, 1)
    assert lead(run, Node(0, 1, "7.1", "a1"), 1).address == "127.0.0.1"


def test_a_node_that_waits_for_node_0_hears_of_a_stop_and_meets_it_all_the_same(run, monkeypatch):
    with Nodes(run, "7.0", 2, only=1) as nodes:
        time.sleep(2)
        nodes.supervisors[0].send_signal(signal.SIGUSR1)
        time.sleep(1)
        assert nodes.supervisors[0].poll() is None
        lead(run, Node(0, 2, "7.0", "localhost"), 1)
        assert nodes.wait(60) == [EXIT_STOPPED]
    assert run.attempt(1).node_verdicts()[0]["reason"] == "stopped on request before the first step"


def test_a_node_whose_node_0_never_comes_leaves_some_time_after_a_stop(run, monkeypatch):
    code = "import sys\nfrom pipeline import launch\nfrom pipeline.supervision import nodes\n"
    code += "nodes.STOPPED_PATIENCE_SECONDS = 1\n"
    code += f"try: launch.main({str(run.path)!r})\nexcept nodes.StoppedBeforeMeeting as e: print(e); sys.exit(75)"
    environment = os.environ | {"VIT_START": "7.0", "SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, said) == (75, "stopped on request; node 0 of start 7.0 began no attempt\n")


def test_a_plan_for_several_nodes_is_not_begun_by_hand_on_one(run):
    environment = {name: value for name, value in os.environ.items() if name != "VIT_START"}
    command = [sys.executable, "-m", "pipeline.launch", str(run.path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "planned for 2 nodes; start one supervisor on each, with one" in ended.stderr
    assert not run.attempts.exists()


def verdict(node: int, *, codes=(), hang: Hang | None = None, time: float = 0.0, **more) -> NodeVerdict:
    ranks = [2 * node, 2 * node + 1]
    return NodeVerdict(node, HOSTS[node], ranks, dict(codes), dict.fromkeys(ranks, "in x"), hang, time=time, **more)


BROKEN = [ExitRecord(rank, EXIT_FAULT, "a collective broke: x") for rank in range(4)]
HERE, THERE = Hang("rank 2 hung", "a2"), Hang("node 0 waited", None, certain=False)


@pytest.mark.parametrize(
    ("records", "nodes", "expected"),
    [
        ([ExitRecord(r, 0, "done") for r in range(4)], [verdict(0), verdict(1)], (EXIT_DONE, "done", None)),
        ([ExitRecord(r, 75, "stopped") for r in range(4)], [verdict(0)], (EXIT_STOPPED, "stopped", None)),
        (BROKEN[:2], [verdict(0)], (76, "node 1 (a2) was lost: its supervisor left no verdict", "a2")),
        ([], [], (76, "node 0 (a1), as 1 others, left no verdict: the job was killed", None)),
        (
            [*BROKEN[:3], ExitRecord(3, 1, "ValueError: x")],
            [verdict(0)],
            (EXIT_FAILED, "rank 3: ValueError: x", None),
        ),
        (
            BROKEN[:3],
            [verdict(0), verdict(1, codes={2: 76, 3: -9})],
            (76, "rank 3 was killed by signal 9 in x, without an exit record", "a2"),
        ),
        (
            BROKEN[:3],
            [verdict(0), verdict(1, codes={3: -9}, out_of_memory=True)],
            (76, f"rank 3 was killed by signal 9 in x, without an exit record; {OUT_OF_MEMORY}", None),
        ),
        (
            BROKEN[1:],
            [verdict(0, codes={0: -15}), verdict(1)],
            (76, "rank 0 was killed by signal 15 in x, without an exit record", None),
        ),
        (BROKEN[:2], [verdict(0, hang=THERE), verdict(1, hang=HERE, time=9.0)], (76, "rank 2 hung", "a2")),
        (BROKEN[1:2], [verdict(0, codes={0: -6}), verdict(1, hang=HERE)], (76, "rank 2 hung", "a2")),
        (BROKEN[:2], [verdict(0, hang=THERE)], (76, "node 1 (a2) was lost: its supervisor left no verdict", "a2")),
        (
            [*BROKEN[:3], ExitRecord(3, 76, "a device failed: uncorrectable ECC error")],
            [verdict(0), verdict(1)],
            (76, "rank 3: a device failed: uncorrectable ECC error", "a2"),
        ),
        (
            [*BROKEN[:3], ExitRecord(3, 76, "/x could not be written: No space left on device")],
            [verdict(0), verdict(1)],
            (76, "rank 3: /x could not be written: No space left on device", None),
        ),
    ],
)
def test_one_verdict_of_all_nodes_names_the_cause_and_the_host_to_avoid(records, nodes, expected):
    assert merged_verdict(records, nodes, HOSTS, 2) == expected


def test_what_a_node_wrote_is_read_back_and_merged_without_a_verdict_of_all(run):
    attempt = lead(run, FIRST, 2).attempt
    seen = verdict(0, codes={0: -6}, hang=Hang("rank 1 hung", "a1"))
    attempt.write_node_verdict(seen, EXIT_FAULT, "rank 1 hung")
    (said,) = attempt.node_verdicts()
    assert NodeVerdict.of(said) == seen
    assert attempt.verdict() == {"code": EXIT_FAULT, "reason": "rank 1 hung", "node": "a1"}


def test_the_next_node_is_lost_when_its_heartbeat_stays_away_and_its_verdict_too(run):
    attempt, now = lead(run, FIRST, 1).attempt, time.monotonic()
    peers = Peers(attempt, FIRST, now)
    assert peers.next_is_lost(now + 60) is None and "did not come" in peers.next_is_lost(now + 2000).reason
    said = {"time": time.time(), "host": "a2", "positions": {"1": {"phase": "data", "step": 3, "count": 5}}}
    write_json(attempt.heartbeat(1), said)
    assert peers.next_is_lost(now) is None and peers.furthest_behind(now, now - 5) == (5, False)  # of unknown age
    write_json(attempt.heartbeat(1), said | {"time": time.time() + 10})
    assert peers.furthest_behind(now + 10, now - 5) == (5, True)
    assert peers.furthest_behind(now + 10, now + 5) == (5, False)
    assert positions_of(attempt) == [Position(5, 3, "data")]
    assert peers.next_is_lost(now + 10 + lost_seconds() - 1) is None
    now += 10 + lost_seconds() + 1
    lost = peers.next_is_lost(now)
    assert lost.reason == f"node 1 (a2) was lost: not heard of for {lost_seconds() + 1:.0f} s" and lost.avoid == "a2"
    assert peers.furthest_behind(now, now) == (None, True)
    assert peers.failure() is None
    attempt.write_node_verdict(verdict(1), EXIT_FAULT, "because")
    assert peers.next_is_lost(now) is None and peers.failure() == "node 1: because"


@pytest.mark.parametrize("ahead", [-7200.0, -70.0, 70.0])
def test_a_clock_that_differs_makes_no_node_lost_and_hides_none_that_is(run, ahead):
    attempt, now = lead(run, FIRST, 1).attempt, time.monotonic()
    peers = Peers(attempt, FIRST, now)
    said = {"host": "a2", "positions": {"1": {"phase": "data", "step": 3, "count": 5}}}
    for passed in range(0, 200, 10):
        write_json(attempt.heartbeat(1), said | {"time": time.time() + ahead + passed})
        peers.watch_next(now + passed)
        assert peers.next_is_lost(now + passed) is None
        assert peers.furthest_behind(now + passed, now + passed - 15) == (5, passed > 0)
    assert peers.next_is_lost(now + passed + lost_seconds() + 1) is not None


def test_a_heartbeat_says_where_the_ranks_of_its_node_are(run):
    attempt = lead(run, FIRST, 1).attempt
    beat(attempt, 1.0, {2: 12}, node=1, positions={2: {"phase": "data", "step": 3, "count": 7, "seconds": 0.5}})
    said = json.loads(attempt.heartbeat(1).read_text())
    assert said["node"] == 1 and said["ranks"] == {"2": 12} and said["positions"]["2"]["seconds"] == 0.5


def test_only_the_newest_start_names_the_attempt(run):
    attempt = lead(run, Node(0, 1, "7.1", "a1"), 1).attempt
    with pytest.raises(FaultError, match=r"replaced by 7\.1"):
        name_attempt(run, FIRST, attempt)


def conclude(run: RunDirectory, start: str = "") -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VIT_")}
    environment |= {"VIT_START": start} if start else {}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.verdict", str(run.path)], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_verdict_is_that_of_the_start_and_one_that_began_nothing_leaves_an_attempt_that_says_so(run):
    assert conclude(run) == (2, f"{run.path}: it has no attempt yet, so there is nothing to conclude\n")
    run.attempt(1).make().write_verdict(EXIT_STOPPED, "stopped on request")
    assert conclude(run) == (EXIT_STOPPED, "attempt 1: stopped on request\n")
    assert conclude(run, "7.0") == (EXIT_FAULT, "attempt 2: no supervisor of start 7.0 began\n")
    verdict = run.attempt(2).verdict()
    assert (verdict["code"], verdict["node"], verdict["step"]) == (EXIT_FAULT, None, -1)
    assert (run.current_attempt(), read_json(run.job_file)["start"]) == (2, "7.0")
    assert conclude(run, "7.0") == (EXIT_FAULT, "attempt 2: no supervisor of start 7.0 began\n")
    late, said = conclude(run, "6.9")
    assert late == EXIT_FAULT and "start 6.9 was replaced by " in said and run.last_attempt() == 2


def test_a_verdict_that_is_seen_late_is_waited_for(run):
    attempt = lead(run, FIRST, 2).attempt
    for rank in range(4):
        attempt.write_exit(ExitRecord(rank, EXIT_DONE, "done"))
    attempt.write_node_verdict(verdict(0), EXIT_DONE, "done")
    late = threading.Timer(1.5, attempt.write_node_verdict, (verdict(1, codes={2: -9}), EXIT_FAULT, "killed"))
    attempt.exit_file(2).unlink()
    late.start()
    said = concluded(run, attempt)
    late.join()
    assert said["reason"] == "rank 2 was killed by signal 9 in x, without an exit record" and said["node"] == "a2"
