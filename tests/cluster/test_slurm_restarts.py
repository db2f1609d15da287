"""What clusters do to jobs, on a real SLURM: requeue, preemption, time limits, power cuts, cut networks, faults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.job import Job, JobState
from cluster.local import LocalLauncher
from cluster.resubmit import restarts_without_progress, resubmit
from cluster.slurm.launcher import SlurmLauncher
from tests.cluster.slurm import wait_until
from tests.cluster.slurm_jobs import LISTENS, SLEEPS, launcher_with, reaches, request_of, starts

pytestmark = pytest.mark.slurm

# One attempt: its verdict says FAULT on this node, unless the file `finish` is there. The step comes from `steps`.
FAULTS = (sys.executable, "-c", """
import json, os, pathlib, sys
number = len(list(pathlib.Path("attempts").glob("*"))) + 1
folder = pathlib.Path(f"attempts/{number:02d}/exit")
folder.mkdir(parents=True)
steps = json.loads(pathlib.Path("steps").read_text())
step = steps[min(number, len(steps)) - 1]
node = os.environ["SLURMD_NODENAME"]
print("attempt", number, "on", node, flush=True)
if pathlib.Path("finish").exists():
    sys.exit(0)
(folder / "verdict.json").write_text(json.dumps({"code": 76, "reason": "", "time": 0, "node": node, "step": step}))
sys.exit(76)
""")  # fmt: skip


# Of two supervisors that stop, srun ends the second when the first is gone; the verdict knows better than srun.
VERDICT = ("bash", "-c", "if [ -e finish ]; then exit 0; else exit 75; fi")


def never_seen_to_end(launcher: SlurmLauncher, job: Job, condition, seconds: float) -> None:
    """Wait, polling as a controller does."""

    def look() -> bool:
        assert launcher.state(job) is not JobState.ENDED, launcher.explain(job)
        return condition()

    wait_until(look, seconds, "a restart")


def test_a_requeued_job_starts_again_under_its_id_and_a_new_start(tmp_path, slurm):
    launcher = launcher_with()
    job = launcher.submit(request_of(tmp_path, LISTENS))
    wait_until(lambda: starts(tmp_path), 40, "a start")
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    never_seen_to_end(launcher, job, lambda: len(starts(tmp_path)) == 2, 60)
    assert launcher.find(tmp_path) == job and launcher.submit(request_of(tmp_path, LISTENS)) == job
    (tmp_path / "finish").touch()
    reaches(launcher, job, JobState.ENDED)
    assert [start for start, _ in starts(tmp_path)] == [f"{job.id}.0", f"{job.id}.1"]
    assert "submitted again as" not in launcher.log(job, 0)[0]


def test_a_preempted_job_gives_way_and_comes_back(tmp_path, slurm):
    launcher = launcher_with(nodes=2)
    job = launcher.submit(request_of(tmp_path / "run", LISTENS))
    wait_until(lambda: len(starts(tmp_path / "run")) == 2, 40, "a start on both nodes")
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent"]
    subprocess.run([*urgent, "--wrap=sleep 2"], check=True, stdout=subprocess.DEVNULL)
    never_seen_to_end(launcher, job, lambda: len(starts(tmp_path / "run")) == 4, 60)
    (tmp_path / "run" / "finish").touch()
    reaches(launcher, job, JobState.ENDED)
    assert {start for start, _ in starts(tmp_path / "run")} == {f"{job.id}.0", f"{job.id}.1"}
    assert launcher.find(tmp_path / "run") == job


def test_before_the_time_limit_the_job_stops_and_is_submitted_again(tmp_path, slurm):
    launcher = launcher_with(nodes=2)
    first = launcher.submit(request_of(tmp_path, LISTENS, stop_lead_seconds=60, verdict_command=VERDICT))
    wait_until(lambda: len(starts(tmp_path)) == 2, 40, "a start on both nodes")
    slurm.end_time(first.id, 40)
    wait_until(lambda: len(starts(tmp_path)) == 4, 90, "a start after the limit")
    second = launcher.find(tmp_path)
    assert second is not None and second.id != first.id and launcher.state(first) is JobState.ENDED
    assert json.loads((tmp_path / "job.json").read_text())["id"] == second.id
    assert f"submitted again as job {second.id}\n" in launcher.log(first, 0)[0]
    (tmp_path / "finish").touch()
    reaches(launcher, second, JobState.ENDED)
    assert launcher.find(tmp_path) == second and "not submitted again: exit code 0" in launcher.log(second, 0)[0]


def test_a_node_without_power_is_noticed_and_the_job_starts_again(tmp_path, slurm):
    launcher = launcher_with(nodes=2)
    job = launcher.submit(request_of(tmp_path, LISTENS))
    wait_until(lambda: len(starts(tmp_path)) == 2, 40, "a start on both nodes")
    slurm.power_cut("node2")
    try:
        never_seen_to_end(launcher, job, lambda: launcher.state(job) is JobState.PENDING, 60)
    finally:
        slurm.start_node("node2")
    never_seen_to_end(launcher, job, lambda: len(starts(tmp_path)) == 4, 60)
    (tmp_path / "finish").touch()
    reaches(launcher, job, JobState.ENDED)
    assert {start for start, _ in starts(tmp_path)} == {f"{job.id}.0", f"{job.id}.1"}


def test_a_node_cut_off_the_network_works_on_while_the_job_starts_again(tmp_path, isolated_slurm):
    """What fences by attempt number are for: both starts live at the same time."""
    launcher, beats = launcher_with(), tmp_path / "beats"
    beat = "while :; do echo $VIT_START $SLURMD_NODENAME >>beats; sleep 0.2; done"
    job = launcher.submit(request_of(tmp_path, ("bash", "-c", beat)))

    def count(start: str) -> int:
        return beats.read_text().split().count(start) if beats.exists() else 0

    wait_until(lambda: count(f"{job.id}.0"), 40, "a start")
    isolated_slurm.cut("node1")
    never_seen_to_end(launcher, job, lambda: count(f"{job.id}.1"), 90)
    before = count(f"{job.id}.0")
    wait_until(lambda: count(f"{job.id}.0") > before, 20, "a sign of the node that was cut off")
    isolated_slurm.heal("node1")


def test_a_fault_is_run_again_elsewhere_until_there_is_no_progress(tmp_path, slurm):
    launcher = launcher_with(max_restarts=2)
    tmp_path.joinpath("steps").write_text("[-1, 5, 5, 5]")
    first = launcher.submit(request_of(tmp_path, FAULTS))
    wait_until(lambda: _said(tmp_path, "no new checkpoint"), 90, "the cap")
    nodes = [line.split()[3] for line in _output(tmp_path).splitlines() if line.startswith("attempt")]
    assert nodes == ["node1", "node2", "node1", "node2", "node1"]  # the second progressed, two followed the third
    assert f"submitted again as job {int(first.id) + 1}, without node1\n" in _output(tmp_path)
    assert "3 attempts in a row made no new checkpoint" in _output(tmp_path)
    wait_until(lambda: slurm.command("squeue", "-h") == "", 20, "an empty queue")


def _output(run: Path) -> str:
    files = sorted((run / "submit").glob("slurm-*.out"), key=lambda path: int(path.stem.partition("-")[2]))
    return "".join(path.read_text() for path in files)


def _said(run: Path, text: str) -> bool:
    return text in _output(run)


def test_a_controller_submits_again_what_was_killed_before_it_could(tmp_path, slurm):
    launcher = launcher_with()
    job = launcher.submit(request_of(tmp_path, LISTENS))
    assert resubmit(tmp_path, 76, launcher) == f"not submitted again: job {job.id} lives"
    wait_until(lambda: starts(tmp_path), 40, "a start")
    subprocess.run(["scancel", "--signal=KILL", "--full", job.id], check=True)
    reaches(launcher, job, JobState.ENDED)
    assert resubmit(tmp_path, 1, launcher) == "not submitted again: exit code 1 does not ask for it"
    said = resubmit(tmp_path, 76, launcher)
    second = launcher.find(tmp_path)
    assert second is not None and said == f"submitted again as job {second.id}" and second.id != job.id
    wait_until(lambda: len(starts(tmp_path)) == 2, 40, "a second start")
    launcher.cancel(second, grace_seconds=30)
    assert resubmit(tmp_path, 75, launcher) == "not submitted again: the run was asked to stop by root"


def test_where_too_few_nodes_are_left_a_fault_is_run_again_on_all(tmp_path, slurm):
    launcher = launcher_with(nodes=2, exclude=None)
    job = launcher.submit(request_of(tmp_path, SLEEPS))
    launcher.cancel(job, grace_seconds=0)
    (tmp_path / "stop.json").unlink()
    verdict = tmp_path / "attempts" / "01" / "exit" / "verdict.json"
    verdict.parent.mkdir(parents=True)
    verdict.write_text(json.dumps({"code": 76, "node": "node2", "step": 3}))
    said = resubmit(tmp_path, 76, launcher)
    second = launcher.find(tmp_path)
    assert second is not None and said == f"submitted again as job {second.id}"


def test_a_job_that_slurm_requeues_gives_way_to_the_one_submitted_after_it(tmp_path, slurm):
    launcher = launcher_with(directives=["--begin=now+1hour"])
    job = launcher.submit(request_of(tmp_path, LISTENS))
    newer = {"kind": "slurm", "id": str(int(job.id) + 1000), "key": "key", "attempt": 1}
    (tmp_path / "job.json").write_text(json.dumps(newer, indent=2))
    subprocess.run(["scontrol", "update", f"job={job.id}", "StartTime=now"], check=True)
    wait_until(lambda: _said(tmp_path, f"job {job.id} gives way to the newer job {newer['id']}"), 60, "giving way")
    assert starts(tmp_path) == []


@pytest.mark.parametrize(
    ("steps", "stale"),
    [([], 0), ([-1], 1), ([5], 0), ([5, 5], 1), ([5, None, None], 2), ([5, None, 9], 0), ([-1, 4, 4, 4], 2)],
)
def test_restarts_without_progress_are_counted_from_the_verdicts(tmp_path, steps, stale):
    for number, step in enumerate(steps, start=1):
        folder = tmp_path / "attempts" / f"{number:02d}" / "exit"
        folder.mkdir(parents=True)
        if step is not None:
            (folder / "verdict.json").write_text(json.dumps({"step": step}))
    assert restarts_without_progress(tmp_path) == stale


def test_a_local_job_is_not_submitted_again_by_anybody_but_its_controller(tmp_path):
    assert resubmit(tmp_path, 75, LocalLauncher()) == "not submitted again: a local job is started by its controller"
