"""Real DeepSpeed training on a real SLURM of two nodes, and what clusters do to it.

However a run is interrupted, the samples of all its attempts are those of one uninterrupted run, in the same order.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.job import JobState
from flows.command_line.runs import run_state
from flows.control.following import Follower
from flows.control.submission import launcher_of, submit
from flows.requests.training import training_run
from pipeline.config.stages import read_run_config
from pipeline.errors import EXIT_DONE, EXIT_INPUT, EXIT_STOPPED, InputError
from pipeline.loading.stream import SampleStream
from pipeline.run_directory import RunDirectory, read_json
from pipeline.shards.index import read_index
from tests.cluster.slurm import wait_until
from tests.pipeline.pictures import small_dataset
from tests.pipeline.training.runs import recorded

pytestmark = pytest.mark.slurm
RECIPE = "pretrain_mae_debug"
STEPS, BATCH, EVERY = 150, 48, 20
SETTINGS = (
    f"steps={STEPS}", f"global_batch_size={BATCH}", "micro_batch_size=2", "data.record=true", "data.lanes=6",
    "data.window_shards=1", f"checkpoint.every_steps={EVERY}", "checkpoint.keep=3", "profile.nodes=2",
    "profile.accelerators_per_node=0", "profile.ranks_per_node=1", "profile.cpus_per_task=1",
    "profile.loader_workers=0", "profile.time=30",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """108 pictures in 12 shards of 9."""
    directory = tmp_path_factory.mktemp("pictures")
    small_dataset(directory, per_class=54, samples_per_shard=9, splits="folders", split_fractions={"train": 1.0})
    return directory / "dataset"


@pytest.fixture
def make_run(home, pictures):
    def make_run(*settings: str) -> RunDirectory:
        return training_run(
            "pretrain", RECIPE, data=str(pictures), profile="slurm", overrides=[*SETTINGS, *settings],
            run_dir=None, home=home,
        )  # fmt: skip

    return make_run


class Controller:
    """Follows a run from a thread, as a flow does."""

    def __init__(self, run: RunDirectory):
        self.run, self.said, self.conclusion = run, [], None
        self.cancelled, self.detached = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        follower = Follower(
            self.run, launcher_of(self.run), self.said.append, cancelled=self.cancelled, detached=self.detached
        )
        self.conclusion = follower.follow()

    def ends(self, seconds: float = 240) -> tuple[int, str]:
        self.thread.join(seconds)
        assert self.conclusion is not None, self.said
        return self.conclusion


def expected(run: RunDirectory) -> list[tuple[int, str]]:
    """Position and key of every sample of the run, from the shards' tables alone."""
    config = read_run_config(run.path)
    stream = SampleStream(config, [read_index(Path(source.path)) for source in config.data.sources])
    positions = np.arange(run.plan()["steps"]["samples"])
    return list(zip(positions.tolist(), stream.keys(positions), strict=True))


def is_one_uninterrupted_run(run: RunDirectory) -> bool:
    return recorded(run, repeats=True) == expected(run)


def has_made(run: RunDirectory, step: int, *, attempt: int) -> bool:
    ledger = run.attempt(attempt).ledger
    return ledger.is_file() and f'"step": {step},' in ledger.read_text()


def reaches_step(run: RunDirectory, step: int, *, attempt: int = 1, seconds: float = 120) -> None:
    wait_until(lambda: has_made(run, step, attempt=attempt), seconds, f"step {step} of attempt {attempt}")


def job_id(run: RunDirectory) -> str:
    return launcher_of(run).find(run.path).id


def vit(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flows", *arguments], env=os.environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_on_two_nodes_is_submitted_listed_followed_and_finished(slurm, home, pictures):
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["pretrain", RECIPE, "--data", str(pictures), "--profile", "slurm", *settings, "--set"]
    command.append("profile.preflight=true")
    said = vit(*command)
    (run,) = (RunDirectory(path.parent) for path in home.glob("runs/*/config.yaml"))
    id = job_id(run)
    assert f"submitted: SLURM job {id}: " in said and f"run directory: {run.path}" in said
    assert f"vit stop {run.path}" in said
    assert f"already submitted: SLURM job {id}" in vit(*command)  # again: no second job
    assert len(slurm.command("squeue", "-h", "-o", "%A").split()) == 1
    listed = vit("runs")
    assert f"SLURM job {id}: " in listed and any(state in listed for state in (" pending ", " running "))
    leaves_the_job_to_itself_at_ctrl_c(run)
    followed = vit("resume", str(run.path))
    assert f"attempt 1 runs as slurm job {id}" in followed and f"step {STEPS}/{STEPS}" in followed
    assert recorded(run) == expected(run) and run.last_attempt() == 1
    assert {path.name for path in run.path.glob("attempts/01/samples/*")} == {"rank-00000.tsv", "rank-00001.tsv"}
    assert read_json(run.attempt(1).path / "meeting.json")["nodes"] == 2
    assert f"submit/slurm-{id}.out" in vit("logs", str(run.path)) and " done " in vit("runs")


def leaves_the_job_to_itself_at_ctrl_c(run: RunDirectory) -> None:
    command = [sys.executable, "-u", "-m", "flows", "resume", str(run.path)]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    next(line for line in watching.stdout if line.startswith("SLURM job ") or " runs as slurm job " in line)
    watching.send_signal(signal.SIGINT)
    said, _ = watching.communicate(timeout=60)
    assert watching.returncode == EXIT_DONE and f": goes on as slurm job {job_id(run)}" in said, said
    assert f"follow it again: vit resume {run.path}" in said
    assert run_state(run, launcher_of(run)) in ("pending", "running") and not (run.path / "stop.json").exists()


def test_before_its_time_limit_a_run_saves_goes_back_into_the_queue_and_finishes(slurm, make_run):
    run = make_run("steps=400")
    controller = Controller(run)
    reaches_step(run, 5)
    first = job_id(run)
    slurm.end_time(first, 20)
    code, reason = controller.ends()
    assert (code, reason) == (EXIT_DONE, "done"), controller.said
    assert job_id(run) != first and run.last_attempt() == 2
    verdict = run.attempt(1).verdict()
    assert verdict["code"] == EXIT_STOPPED and verdict["reason"].endswith("checkpoint complete"), verdict
    assert recorded(run) == expected(run)  # not one step was made twice


def test_a_preempted_run_goes_on_when_its_nodes_are_free_again(slurm, make_run, tmp_path):
    run = make_run()
    controller = Controller(run)
    reaches_step(run, EVERY + 1)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-t", "5", "-o", "/dev/null"]
    other = slurm.command(*urgent, "--wrap", "sleep 3")
    assert other
    assert controller.ends() == (EXIT_DONE, "done"), controller.said
    assert run.last_attempt() == 2 and is_one_uninterrupted_run(run)
    assert slurm.command("sacct", "-D", "-n", "-X", "-j", job_id(run), "-o", "state%20").split()[0] == "PREEMPTED"


def test_a_run_that_somebody_cancels_stays_so_until_it_is_resumed_and_a_stop_is_confirmed(slurm, make_run):
    run = make_run("steps=200")
    controller = Controller(run)
    reaches_step(run, EVERY + 1)
    slurm.command("scancel", job_id(run))
    code, reason = controller.ends()
    assert code != EXIT_DONE and slurm.command("squeue", "-h") == "", controller.said
    assert run_state(run, launcher_of(run)) in ("stopped", "lost", "failed")
    controller = Controller(run)
    wait_until(lambda: run.last_attempt() == 2, 60, "a second attempt")
    before = run.newest_checkpoint().step
    reaches_step(run, before + 2, attempt=2)
    said = vit("stop", str(run.path))
    assert "checkpoint complete" in said and "go on with: vit resume" in said
    assert slurm.command("squeue", "-h") == "" and not launches(run)
    assert controller.ends(30)[0] == EXIT_STOPPED
    stopped_at = run.newest_checkpoint().step
    assert stopped_at > before and run_state(run, launcher_of(run)) == "stopped"
    assert Controller(run).ends() == (EXIT_DONE, "done")
    assert run.last_attempt() == 3 and is_one_uninterrupted_run(run)


def launches(run: RunDirectory) -> list[str]:
    """Processes of any node that work on the run."""
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if str(run.path) in line and "pipeline." in line]


def test_a_job_that_waits_is_cancelled_at_once(slurm, make_run):
    run = make_run("profile.dependency=afterok:1000000", "profile.directives=[--hold]")
    job = submit(run)
    launcher = launcher_of(run)
    wait_until(lambda: launcher.state(job) is JobState.PENDING, 20)
    assert run_state(run, launcher) == "pending"
    assert "ended before an attempt began" in vit("stop", str(run.path))
    assert launcher_of(run).state(job) is JobState.ENDED and slurm.command("squeue", "-h") == ""


def test_a_node_that_loses_power_takes_nothing_of_the_run_with_it(slurm, make_run):
    run = make_run()
    controller = Controller(run)
    reaches_step(run, EVERY + 5)
    slurm.power_cut("node2")
    wait_until(lambda: "down" in slurm.command("sinfo", "-h", "-n", "node2", "-o", "%t"), 60, "node2 down")
    slurm.start_node("node2")
    assert controller.ends() == (EXIT_DONE, "done"), controller.said
    assert run.last_attempt() >= 2 and is_one_uninterrupted_run(run)


def test_a_controller_that_is_away_for_a_minute_is_waited_for(slurm, make_run):
    run = make_run()  # ends while nobody can say so
    controller = Controller(run)
    reaches_step(run, 5)
    slurm.stop_controller()
    time.sleep(60)
    assert launcher_of(run).state(launcher_of(run).find(run.path)) is JobState.UNKNOWN
    slurm.start_controller()
    assert controller.ends() == (EXIT_DONE, "done"), controller.said
    assert any("slurm does not answer" in line for line in controller.said)
    assert run.last_attempt() == 1 and recorded(run) == expected(run)


def test_what_sbatch_refuses_is_said_in_one_line_and_exits_with_2(slurm, home, pictures, make_run):
    with pytest.raises(InputError, match="not submitted: sbatch refused .*: .*invalid partition"):
        submit(make_run("profile.partition=nowhere"))
    settings = [word for setting in (*SETTINGS, "profile.nodes=3") for word in ("--set", setting)]
    said = vit("pretrain", RECIPE, "--data", str(pictures), "--profile", "slurm", *settings, code=EXIT_INPUT)
    (line,) = [line for line in said.splitlines() if "not submitted" in line]
    assert "Node count" in line or "node" in line, said
    assert slurm.command("squeue", "-h") == ""


def test_a_range_of_nodes_begins_with_what_is_there(slurm, make_run):
    slurm.command("scontrol", "update", "nodename=node2", "state=drain", "reason=test")
    try:
        run = make_run("profile.nodes=1-2", "steps=40")
        assert run.plan()["nodes_range"] == [1, 2]
        assert Controller(run).ends() == (EXIT_DONE, "done")
    finally:
        slurm.command("scontrol", "update", "nodename=node2", "state=resume")
    assert run.plan()["nodes"] == 1 and recorded(run) == expected(run)


def test_a_sweep_is_an_array_and_one_table(slurm, home, pictures):
    settings = [*SETTINGS, "profile.nodes=1", "steps=10", "optimizer.learning_rate=[1e-3,3e-4]"]
    words = [word for setting in settings for word in ("--set", setting)]
    said = vit("sweep", RECIPE, "--data", str(pictures), "--profile", "slurm", *words)
    (table,) = home.glob("runs/*-sweep-*/sweep.json")
    rows = read_json(table)["rows"]
    assert [row["state"] for row in rows] == ["done", "done"] and ": 2 of 2 runs done" in said
    runs = [RunDirectory(row["run"]) for row in rows]
    assert all(recorded(run) == expected(run) for run in runs)
    first, second = (job_id(run) for run in runs)
    assert (first.partition("_")[2], second.partition("_")[2]) == ("0", "1")
    assert first.partition("_")[0] == second.partition("_")[0]


def test_a_node_that_is_cut_off_the_network_does_not_write_beside_its_successor(isolated_slurm, make_run):
    run = make_run("profile.nodes=1-2", "steps=60")
    controller = Controller(run)
    reaches_step(run, EVERY + 5)
    assert run.plan()["nodes"] == 2  # all that were there
    isolated_slurm.cut("node2")
    wait_until(lambda: run.last_attempt() == 2, 120, "a second attempt, without the node")
    assert controller.ends() == (EXIT_DONE, "done"), controller.said
    assert run.plan()["nodes"] == 1 and run.current_attempt() == 2
    assert is_one_uninterrupted_run(run)
    said = run.result_file.read_text()
    isolated_slurm.heal("node2")
    wait_until(lambda: not launches(run), 60, "the end of the rank that was cut off")
    assert run.result_file.read_text() == said and run.current_attempt() == 2
    assert not list(run.checkpoints.glob("*.partial"))
