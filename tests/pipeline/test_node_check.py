"""The check of all nodes before a job: what it names, and that it answers within a minute."""

import json
import subprocess
import sys
import time

import pytest

from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_INPUT
from pipeline.node_check import STAGES, clock_faults, faults_of, reduction_faults
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.supervision.nodes import Node
from tests.pipeline.training.two_nodes import environment_of

SHOWN = {"host": "a", "parts": {"code": "1", "torch": "2.9"}, "accelerators": 4, "written": 1e9, "time": 100.0}


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.config_file.touch()
    write_json(run.plan_file, {"stage": "pretrain", "nodes": 2, "ranks_per_node": 1, "accelerators_per_node": 0})
    return run


def check(run: RunDirectory, node: int, **more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline.node_check", str(run.path)]
    environment = environment_of("7.0", node, 2, SLURM_JOB_NODELIST="localhost,b17", **more)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def concluded(run: RunDirectory) -> tuple[int, str]:
    command = [sys.executable, "-m", "pipeline.verdict", str(run.path)]
    done = subprocess.run(command, env=environment_of("7.0", 0, 2), capture_output=True, text=True)
    return done.returncode, done.stdout.rstrip("\n")


def test_nodes_that_can_do_the_job_tell_their_speeds(run):
    both = [check(run, node) for node in (1, 0)]
    said, told = (process.communicate(timeout=90)[0] for process in both)
    assert [process.returncode for process in both] == [EXIT_DONE, EXIT_DONE], told + said
    assert "all-reduce of 64 MiB over 2 nodes: " in told and "GB/s each" in told
    assert "node 1 (localhost): " in told and "MiB/s to the run directory" in told
    assert told.endswith("all 2 nodes can do the job\n")


def test_a_node_that_never_comes_is_named_within_a_minute_and_leads_to_an_attempt_that_names_it(run):
    began = time.monotonic()
    process = check(run, 0)
    assert "node 1 (b17): did not come within 30 s\n" in process.communicate(timeout=70)[0]
    assert process.returncode == EXIT_FAULT and time.monotonic() - began < 60
    code, said = concluded(run)
    assert (code, said) == (
        EXIT_FAULT,
        "attempt 1: check of the nodes: node 1 (b17): did not come within 30 s (node to avoid: b17)",
    )
    assert run.attempt(1).verdict()["node"] == "b17" and read_json(run.job_file)["attempt"] == 1


def shown(**of_second: object) -> dict[int, dict]:
    return {0: SHOWN, 1: SHOWN | {"host": "b"} | of_second, 2: SHOWN | {"host": "c"}}


@pytest.mark.parametrize(
    ("of_second", "words"),
    [
        ({}, []),
        ({"parts": {"code": "1", "torch": "2.8"}}, ["differs in torch (2.8, not 2.9)"]),
        ({"parts": {"code": "1", "torch": "none"}}, ["has no torch; install the environment there"]),
        ({"accelerators": 3}, ["shows 3 accelerators, the plan needs 4"]),
    ],
)
def test_the_node_that_differs_or_lacks_something_is_named(of_second, words):
    faults = faults_of(shown(**of_second), {"accelerators_per_node": 4}, Node(0, 3, "7.0", "a"))
    assert faults == [(1, "b", one) for one in words]


def test_a_clock_that_is_off_is_named_and_one_that_was_merely_late_is_not():
    seen = {0: 100.0, 1: 130.0, 2: 101.0}
    assert clock_faults(shown(time=129.0), 99.0, seen) == []
    assert clock_faults(shown(time=80.0), 99.0, seen) == [(1, "b", "its clock is 19 s behind node 0's; synchronise it")]
    assert clock_faults(shown(time=150.0), 99.0, seen)[0][2].startswith("its clock is 20 s ahead")


def test_the_node_that_came_less_far_in_the_all_reduce_is_named():
    def at(*stages: int) -> list:
        return reduction_faults({n: {"stage": STAGES[stage]} for n, stage in enumerate(stages)}, shown())

    assert at(3, 3, 3) == [] == at(0, 0, 0)
    assert at(2, 1, 2) == [(1, "b", "all-reduce: still meeting the others at the end")]
    assert at(2, 2, 2) == [(0, "unknown host", "all-reduce: all nodes still adding up at the end")]


def test_what_all_nodes_lack_is_wrong_input(run):
    plan = json.loads(run.plan_file.read_text()) | {"accelerators_per_node": 99}
    write_json(run.plan_file, plan)
    both = [check(run, node) for node in (0, 1)]
    told = both[0].communicate(timeout=90)[0]
    both[1].communicate(timeout=90)
    assert [process.returncode for process in both] == [EXIT_INPUT, EXIT_INPUT]
    assert "accelerators, the plan needs 99" in told
    assert concluded(run)[0] == EXIT_INPUT
