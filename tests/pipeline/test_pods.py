"""Pods of a Job, each started again alone: they agree on one attempt, or on that it is over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.job import write_object
from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, FaultError
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.supervision import pods
from pipeline.supervision.judgement import ExitRecord, NodeVerdict
from pipeline.supervision.liveness import beat
from pipeline.supervision.pods import Finished, Pod, code_of_all, meet, started_again, why_over

FIRST = Pod(0, "u0", "vit-a:1", "1", 2, 2, "vit-a-0.vit-a", 29500, 20.0)
SECOND = replace(FIRST, index=1, uid="u1")


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDirectory:
    monkeypatch.setattr(pods, "LOOK_SECONDS", 0.02)
    run = RunDirectory(tmp_path)
    run.config_file.touch()
    plan = {"stage": "pretrain", "ranks_per_node": 1, "world_size": 2, "nodes": 2, "accelerators_per_node": 0}
    write_json(run.plan_file, plan)
    return run


@pytest.fixture
def pool(run) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool
        run.result_file.write_text("{}")  # whoever still waits leaves


def comes(pool: ThreadPoolExecutor, run: RunDirectory, pod: Pod, counts: list | None = None) -> Future:
    return pool.submit(meet, run, pod, f"machine-{pod.uid}", 1, (counts if counts is not None else []).append)


def where(come: Future) -> tuple[Path, str, int]:
    meeting = come.result()[0]
    return meeting.attempt.path, meeting.address, meeting.port


def until(true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pod_is_known_by_the_variables_of_the_manifest():
    given = {"VIT_POD": "u", "JOB_COMPLETION_INDEX": "3", "VIT_START": "7", "VIT_NODES": "2-4", "VIT_JOB": "vit-a:7"}
    given |= {"MASTER_ADDR": "a-0.a", "MASTER_PORT": "29500", "VIT_GATHER_SECONDS": "60"}
    assert Pod.here(given, 9) == Pod(3, "u", "vit-a:7", "7", 2, 4, "a-0.a", 29500, 60.0)
    for name in ("VIT_POD", "JOB_COMPLETION_INDEX"):
        assert Pod.here({key: value for key, value in given.items() if key != name}, 2) is None
    assert Pod.here(given | {"VIT_ATTEMPT": "3"}, 2) is None


def test_pods_that_come_minutes_apart_and_in_any_order_meet_in_one_attempt(run, pool):
    second = comes(pool, run, SECOND)
    time.sleep(0.2)
    assert not second.done() and not run.attempts.exists()
    first = comes(pool, run, FIRST)
    (_, of_first), (_, of_second) = first.result(), second.result()
    assert where(first) == where(second) == (run.path / "attempts/01", "vit-a-0.vit-a", 29500)
    assert [(node.number, node.count, node.start) for node in (of_first, of_second)] == [(0, 2, "1.1"), (1, 2, "1.1")]
    assert of_first.hosts == of_second.hosts == ("machine-u0", "machine-u1")
    job = read_json(run.job_file)
    assert (job["kind"], job["id"], job["attempt"], job["start"]) == ("kubernetes", "vit-a:1", 1, "1.1")


def test_a_pod_that_is_made_again_does_not_slip_into_the_attempt_of_the_one_before(run, pool):
    first, second = comes(pool, run, FIRST), comes(pool, run, SECOND)
    attempt = first.result()[0].attempt
    second.result()
    assert why_over(attempt) is None
    again = comes(pool, run, replace(SECOND, uid="u1-again"))
    until(lambda: started_again(attempt) == 1)
    assert why_over(attempt) == "pod 1 was started again: the one that took part is gone" and not again.done()
    (led, _), (joined, node) = comes(pool, run, replace(FIRST, uid="u0-again")).result(), again.result()
    assert led.attempt.number == joined.attempt.number == 2 and node.start == "1.2"
    assert why_over(led.attempt) is None
    assert why_over(attempt) == "pod 1 was started again: the one that took part is gone"


def test_when_the_first_pod_alone_is_made_again_the_others_see_that_their_attempt_is_over(run, pool):
    first, second = comes(pool, run, FIRST), comes(pool, run, SECOND)
    attempt = first.result()[0].attempt
    second.result()
    waiting = comes(pool, run, replace(FIRST, uid="u0-again"))
    until(lambda: read_json(run.job_file)["attempt"] == 2)
    assert why_over(attempt) == "attempt 1 was replaced by attempt 2: the first pod was started again"
    assert where(comes(pool, run, replace(SECOND, uid="u1-again"))) == where(waiting)


def test_a_pod_that_dies_before_all_have_met_is_replaced_without_a_restart_of_the_first(run, pool):
    three = replace(FIRST, least=3, most=3)
    first, second = comes(pool, run, three), comes(pool, run, replace(three, index=1, uid="u1"))
    until(lambda: len(list(run.path.glob("attempts/01/seats/*/pod"))) == 2)
    again = comes(pool, run, replace(three, index=1, uid="u1-again"))
    until(lambda: run.last_attempt() == 2)
    third = comes(pool, run, replace(three, index=2, uid="u2"))
    assert where(first) == where(again) == where(third)
    assert set(read_json(first.result()[0].attempt.meeting_file)["pods"].values()) == {"u0", "u1-again", "u2"}
    assert run.attempt(1).verdict()["code"] == EXIT_FAULT
    with pytest.raises(FaultError, match="pod 1 was started again, and this one leaves its seat to it"):
        second.result()  # cut off rather than dead, it hears the next call too


def test_of_a_range_those_begin_that_came_in_time_and_a_late_one_waits_for_the_next_attempt(run, pool):
    first = replace(FIRST, least=2, most=4, gather_seconds=0.3)
    counts: list[int] = []
    led, third = comes(pool, run, first, counts), comes(pool, run, replace(first, index=3, uid="u3"))
    assert where(led) == where(third) and counts == [2]
    assert (third.result()[1].number, third.result()[1].count) == (1, 2)  # numbered anew, without a gap
    late = comes(pool, run, replace(first, index=1, uid="u1"))
    time.sleep(0.6)  # longer than it would wait for a first pod that does not call
    assert not late.done() and why_over(led.result()[0].attempt) is None
    again = comes(pool, run, replace(first, uid="u0-again"), counts)
    assert where(comes(pool, run, replace(first, index=3, uid="u3-again"))) == where(again)
    assert where(late) == where(again) and counts == [2, 3]


def test_a_pod_that_answered_looks_afresh_where_the_meeting_will_be(run, pool, monkeypatch):
    looked: list[Path] = []
    monkeypatch.setattr(pods, "AFRESH_SECONDS", 0.05)
    monkeypatch.setattr(pods, "look_afresh", looked.append)
    second = comes(pool, run, SECOND)
    until(lambda: run.path in looked)
    run.attempt(1).path.mkdir(parents=True)
    write_json(run.job_file, {"kind": "kubernetes", "id": "vit-a:1", "key": "k", "attempt": 1, "start": "1.1"})
    until(lambda: run.attempt(1).path in looked)
    assert not second.done()


def test_too_few_in_time_is_a_fault_that_says_how_many(run, pool):
    with pytest.raises(FaultError, match="1 of 2 pods came within 0 s, and 2 are needed; see why the others wait"):
        comes(pool, run, replace(FIRST, gather_seconds=0.1)).result()
    assert run.attempt(1).verdict()["code"] == EXIT_FAULT
    with pytest.raises(FaultError, match="no first pod called within 0 s"):
        comes(pool, run, replace(SECOND, generation="2", gather_seconds=0.1)).result()


def test_a_pod_of_an_older_job_and_a_first_pod_that_was_replaced_leave_the_run_alone(run, pool):
    write_json(run.job_file, {"kind": "kubernetes", "id": "vit-a:2", "key": "k", "attempt": 3, "start": "2.3"})
    for pod in (FIRST, SECOND):
        with pytest.raises(FaultError, match="replaced by 2.3|job 2 took over from job 1"):
            comes(pool, run, pod).result()
    assert read_json(run.job_file)["start"] == "2.3"


def test_a_pod_that_comes_when_the_run_is_done_has_nothing_to_do(run, pool):
    waiting = comes(pool, run, SECOND)
    run.result_file.write_text("{}")
    with pytest.raises(Finished):
        waiting.result()


def test_all_pods_end_with_the_code_of_all_and_a_silent_one_is_waited_for_while_its_heart_beats(run, pool):
    first, second = comes(pool, run, FIRST), comes(pool, run, SECOND)
    attempt = first.result()[0].attempt
    second.result()
    attempt.write_exit(ExitRecord(0, EXIT_DONE, "done"))
    attempt.write_node_verdict(NodeVerdict(0, "a", [0], {0: 0}), EXIT_DONE, "done")
    beat(attempt, 1.0, {1: 12}, node=1)
    late = pool.submit(code_of_all, attempt, 0.6)
    for _ in range(3):
        time.sleep(0.4)
        beat(attempt, 1.0, {1: 12}, node=1)
    assert not late.done()
    attempt.write_exit(ExitRecord(1, EXIT_STOPPED, "stopped"))
    attempt.write_node_verdict(NodeVerdict(1, "b", [1], {1: 75}), EXIT_STOPPED, "stopped")
    assert late.result() == (EXIT_STOPPED, "stopped")
    attempt.node_verdict(1).unlink()
    attempt.exit_file(1).unlink()
    code, reason = code_of_all(attempt, 0.2)
    assert code == EXIT_FAULT and "was lost: its supervisor left no verdict" in reason


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "VIT_"))}


def in_pod(index: int, uid: str, **more: str) -> dict[str, str]:
    return ENVIRONMENT | {
        "VIT_POD": uid, "VIT_JOB": "vit-a:1", "VIT_START": "1", "VIT_NODES": "2", "JOB_COMPLETION_INDEX": str(index),
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "VIT_GATHER_SECONDS": "60", "VIT_NODE_NAME": f"gpu-{index}",
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    } | more  # fmt: skip


@pytest.mark.parametrize("write", [write_json, write_object])
def test_processes_of_one_number_on_one_host_write_one_file_and_none_is_damaged(tmp_path, monkeypatch, write):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in every container
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-1")  # with the host's own network
    path, contents = tmp_path / "job.json", [{"attempt": n, "start": "x" * 4000 * n} for n in range(1, 9)]

    def again(content: dict) -> None:
        for _ in range(60):
            write(path, content)
            assert read_json(path) in contents

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(again, content) for content in contents]:
            done.result()
    assert [entry.name for entry in tmp_path.iterdir()] == ["job.json"]


@pytest.mark.parametrize("damage", [b'{"kind": "kube', b"\xff\xfe", b"\0" * 20])
def test_a_damaged_file_that_pods_share_is_a_fault_of_the_machinery_in_one_line(run, damage):
    run.job_file.write_bytes(damage)
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.launch", str(run.path)], env=in_pod(1, "u1"), capture_output=True, text=True
    )
    assert ended.returncode == EXIT_FAULT and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert str(run.job_file) in ended.stderr


def test_a_waiting_supervisor_hears_of_a_stop(run):
    for index in (0, 1):
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.launch", str(run.path)], env=in_pod(index, f"u{index}"),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=20 if index == 0 else 60)
        assert (process.returncode, said.splitlines()[-1]) == (
            EXIT_STOPPED, f"pod {index} was stopped on request before all pods had met"
        )  # fmt: skip
        run.job_file.unlink(missing_ok=True)


REAPS = """
import os, subprocess, sys, time
from pipeline.supervision.orphans import IS_INIT, reap_orphans
own = subprocess.Popen(["sh", "-c", "(sleep 0.2; exit 3) & exit 5"])
deadline = time.monotonic() + 10
while own.poll() is None and time.monotonic() < deadline:
    reap_orphans({own.pid}); time.sleep(0.01)
time.sleep(0.6)
states = lambda: [open(f"/proc/{pid}/stat").read().split()[2] for pid in os.listdir("/proc") if pid.isdigit()]
before = states().count("Z")
reap_orphans({own.pid})
print(IS_INIT, own.returncode, before, states().count("Z"))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace needs root")
def test_the_first_process_of_a_container_takes_off_what_others_leave_and_keeps_its_own_codes():
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", REAPS], capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "5", "1", "0"], done.stdout + done.stderr
