"""Real training by two supervisors as two pods of a Job, each made again alone. Plain processes: no cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED
from pipeline.run_directory import RunDirectory, read_json
from tests.pipeline.training.runs import BATCH, recorded
from tests.pipeline.training.two_nodes import has_committed, run_for_nodes, until

pytestmark = pytest.mark.slow
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "VIT_"))}


class Pods:
    """A Job's pods; `make` starts one of an index, as the Job does when the one before has ended."""

    def __init__(self, run: RunDirectory):
        self.run, self.made = run, []

    def make(self, index: int) -> subprocess.Popen:
        of_pod = {
            "VIT_POD": f"uid-{len(self.made)}", "VIT_JOB": "vit-a:1", "VIT_START": "1", "VIT_NODES": "2",
            "JOB_COMPLETION_INDEX": str(index), "MASTER_ADDR": "localhost", "VIT_NODE_NAME": "localhost",
            "VIT_GATHER_SECONDS": "120", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "pipeline.launch", str(self.run.path)]
        self.made.append(subprocess.Popen(command, env=ENVIRONMENT | of_pod))
        return self.made[-1]


@pytest.fixture
def pods(tmp_path, pictures) -> Iterator[Pods]:
    pods = Pods(run_for_nodes(tmp_path, pictures, "steps=100000", "checkpoint.every_steps=5"))
    yield pods
    for pod in pods.made:
        pod.kill()
        pod.wait()


def test_a_pod_that_dies_takes_its_peer_along_and_both_go_on_together_until_the_job_is_deleted(pods):
    first, second = pods.make(0), pods.make(1)
    until(lambda: has_committed(pods.run, 5), "a checkpoint")
    second.kill()  # as the kernel does that is out of memory, or the node that loses power
    died = time.monotonic()
    second = pods.make(1)
    assert first.wait(90) == EXIT_FAULT
    assert time.monotonic() - died < 75 and second.poll() is None
    reached = pods.run.newest_checkpoint().step
    both = [pods.make(0), second]
    until(lambda: has_committed(pods.run, reached + 5), "a checkpoint of the second attempt")
    for pod in both:
        pod.send_signal(signal.SIGTERM)  # as the kubelet does when the Job is deleted
    assert [pod.wait(60) for pod in both] == [EXIT_STOPPED, EXIT_STOPPED]
    job = read_json(pods.run.job_file)
    assert (job["id"], job["attempt"], job["start"]) == ("vit-a:1", 2, "1.2")
    assert [pods.run.attempt(number).verdict()["code"] for number in (1, 2)] == [EXIT_FAULT, EXIT_STOPPED]
    assert pods.run.attempt(2).verdict()["step"] == pods.run.newest_checkpoint().step > reached


def test_an_eviction_of_one_pod_of_two_saves_a_checkpoint_and_both_go_on_with_the_very_next_image(tmp_path, pictures):
    pods = Pods(run_for_nodes(tmp_path, pictures, "steps=40", "checkpoint.every_steps=1000"))
    try:
        both = [pods.make(0), pods.make(1)]
        until(lambda: _steps(pods.run, 1) > 3, "the third step", 300)
        both[1].send_signal(signal.SIGTERM)  # as the kubelet does when a node is drained; the other hears nothing
        assert [pod.wait(150) for pod in both] == [EXIT_STOPPED, EXIT_STOPPED]
        saved = pods.run.newest_checkpoint()
        assert 3 < saved.step < 40 and pods.run.attempt(1).verdict()["code"] == EXIT_STOPPED
        both = [pods.make(1), pods.make(0)]  # made again in any order
        assert [pod.wait(300) for pod in both] == [EXIT_DONE, EXIT_DONE]
    finally:
        for pod in pods.made:
            pod.kill()
            pod.wait()
    job = read_json(pods.run.job_file)
    assert (job["attempt"], job["start"]) == (2, "1.2")
    assert json.loads(pods.run.attempt(2).ledger.read_text().splitlines()[0])["step"] == saved.step + 1
    assert sorted(position for position, _ in recorded(pods.run)) == list(range(40 * BATCH))  # each image once


def _steps(run: RunDirectory, attempt: int) -> int:
    ledger = run.attempt(attempt).ledger
    return len(ledger.read_text().splitlines()) if ledger.exists() else 0
