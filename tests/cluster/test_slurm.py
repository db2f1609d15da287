"""The launcher on a real SLURM, with opaque commands as jobs: no double submission, no lost job, no false end."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from cluster.job import JobState, SubmitError
from cluster.slurm.commands import accounted
from tests.cluster.slurm import wait_until
from tests.cluster.slurm_jobs import LISTENS, SLEEPS, launcher_with, logs, reaches, request_of, starts

pytestmark = pytest.mark.slurm
STOPS_ONCE = "echo listening; [ ! -e gone ] || exit 0; until [ -e go ]; do sleep 0.2; done; mv go gone; exit 75"


def test_a_job_that_lives_is_found_and_not_submitted_twice(tmp_path, slurm):
    launcher = launcher_with()
    job = launcher.submit(request_of(tmp_path, SLEEPS))
    assert launcher_with().submit(request_of(tmp_path, SLEEPS)) == job == launcher.find(tmp_path)
    assert slurm.command("squeue", "-h", "-o", "%A").split() == [job.id]
    assert json.loads((tmp_path / "job.json").read_text())["id"] == job.id
    logs(launcher, job, "listening")
    assert launcher.state(job) is JobState.RUNNING and "RUNNING, on node1" in launcher.explain(job)


def test_two_runs_of_one_key_are_told_apart_by_their_directories(tmp_path, slurm):
    launcher = launcher_with()
    first = launcher.submit(request_of(tmp_path / "a", SLEEPS))
    second = launcher.submit(request_of(tmp_path / "b", SLEEPS))
    assert first != second and launcher.find(tmp_path / "a") == first and launcher.find(tmp_path / "b") == second


def test_paths_and_variables_reach_the_job_as_they_are_and_its_code_is_the_jobs(tmp_path, slurm):
    directory, greeting = tmp_path / 'it\'s "mine" $HOME %j #1 \\ `x`', 'it\'s "$HOME" `x` \\ #'
    show = "import os, sys; print([os.getcwd(), os.environ['GREETING'], oct(os.umask(0)), sys.argv[1]]); sys.exit(3)"
    request = request_of(directory, (sys.executable, "-c", show, "a 'b'"), environment={"GREETING": greeting})
    launcher = launcher_with(umask="0027", memory="100M")
    job = launcher.submit(request)
    reaches(launcher, job, JobState.ENDED)
    assert repr([str(directory), greeting, "0o27", "a 'b'"]) in launcher.log(job, 0)[0]
    wait_until(lambda: "exit code 3:0" in launcher.explain(job), 20, "the exit code in the accounts")
    assert "FAILED" in launcher.explain(job) and launcher.find(directory) == job
    text, offset = launcher.log(job, 2)
    assert text == launcher.log(job, 0)[0][2:] and launcher.log(job, offset) == ("", offset)
    assert [record.comment for record in accounted(job=job.id)] == [f"run {directory}"]


def test_nothing_of_the_submitters_shell_enters_the_job(tmp_path, slurm, monkeypatch):
    for name in ("MY_SECRET", "SBATCH_PARTITION", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "urgent")
    launcher = launcher_with()
    job = launcher.submit(request_of(tmp_path, ("bash", "-c", "env; echo HOME=$HOME")))
    reaches(launcher, job, JobState.ENDED)
    text = launcher.log(job, 0)[0]
    assert "MY_SECRET" not in text and "=urgent" not in text and f"VIT_START={job.id}.0\n" in text and "PATH=/" in text


@pytest.mark.parametrize("again", ["submit", "find"])
def test_a_job_whose_submitter_was_killed_before_it_wrote_job_json_is_found_by_name(tmp_path, slurm, again):
    run, commands = tmp_path / "run", tmp_path / "commands"
    commands.mkdir()
    real = shutil.which("sbatch")
    (commands / "sbatch").write_text(f'#!/bin/bash\n{real} "$@" >{tmp_path}/id\nkill -9 $PPID\n')
    (commands / "sbatch").chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from tests.cluster.slurm_jobs import *; "
        "launcher_with().submit(request_of(Path(sys.argv[1]), SLEEPS))"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(run)], env=os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}
    )
    assert killed.returncode == -9 and not (run / "job.json").exists()
    launcher = launcher_with()
    job = launcher.find(run) if again == "find" else launcher.submit(request_of(run, SLEEPS))
    assert job is not None and job.id == (tmp_path / "id").read_text().strip()
    assert launcher.submit(request_of(run, SLEEPS)) == job and (run / "job.json").exists()
    assert slurm.command("squeue", "-h", "-o", "%A").split() == [job.id]
    logs(launcher, job, "listening")


def test_a_pending_job_says_why_and_is_cancelled_at_once(tmp_path, slurm):
    launcher = launcher_with(directives=["--begin=now+1hour"])
    job = launcher.submit(request_of(tmp_path, SLEEPS))
    assert launcher.state(job) is JobState.PENDING and "PENDING (BeginTime)" in launcher.explain(job)
    began = time.monotonic()
    launcher.cancel(job, grace_seconds=300)
    assert time.monotonic() - began < 20 and launcher.state(job) is JobState.ENDED
    assert json.loads((tmp_path / "stop.json").read_text())["by"]
    assert launcher.submit(request_of(tmp_path, SLEEPS)) != job and not (tmp_path / "stop.json").exists()


def test_a_running_job_is_asked_to_stop_and_is_not_submitted_again(tmp_path, slurm):
    launcher = launcher_with(nodes=2)
    job = launcher.submit(request_of(tmp_path, LISTENS))
    wait_until(lambda: len(starts(tmp_path)) == 2, 40, "a start on both nodes")
    launcher.cancel(job, grace_seconds=60)
    assert launcher.state(job) is JobState.ENDED and slurm.command("squeue", "-h") == ""
    assert "not submitted again: the run was asked to stop by root" in launcher.log(job, 0)[0]
    wait_until(lambda: "exit code 75:0" in launcher.explain(job), 20, "the exit code in the accounts")


def test_a_job_that_does_not_listen_is_ended_after_its_grace(tmp_path, slurm):
    launcher = launcher_with()
    refuses = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('listening', flush=True); "
    job = launcher.submit(request_of(tmp_path, (sys.executable, "-c", refuses + "time.sleep(300)")))
    logs(launcher, job, "listening")
    launcher.cancel(job, grace_seconds=2)
    assert launcher.state(job) is JobState.ENDED and slurm.command("squeue", "-h") == ""


def test_a_controller_that_is_down_is_unknown_and_nothing_is_submitted(tmp_path, slurm):
    launcher = launcher_with()
    job = launcher.submit(request_of(tmp_path / "a", LISTENS))
    stops = launcher.submit(request_of(tmp_path / "c", ("bash", "-c", STOPS_ONCE)))
    logs(launcher, job, "listening"), logs(launcher, stops, "listening")
    slurm.stop_controller()
    (tmp_path / "c" / "go").touch()
    try:
        assert launcher.state(job) is JobState.UNKNOWN
        assert launcher.find(tmp_path / "a") == job and "Unable to contact slurm controller" in launcher.explain(job)
        with pytest.raises(SubmitError, match="nothing was submitted: .*Unable to contact slurm controller"):
            launcher.submit(request_of(tmp_path / "b", SLEEPS))
    finally:
        slurm.start_controller()
    reaches(launcher, job, JobState.RUNNING)
    (tmp_path / "a" / "finish").touch()
    reaches(launcher, job, JobState.ENDED)
    assert len(starts(tmp_path / "a")) == 1 and launcher.find(tmp_path / "b") is None
    logs(launcher, stops, "submitted again as job", seconds=60)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"nodes": 3}, "Node count specification invalid"),
        ({"accelerators_per_node": 9}, "Requested node configuration is not available"),
        ({"time": "soon"}, "Invalid --time specification"),
    ],
)
def test_a_refusal_is_one_line_with_the_reason_of_sbatch(tmp_path, slurm, fields, said):
    with pytest.raises(SubmitError, match=said) as refused:
        launcher_with(**fields).submit(request_of(tmp_path, SLEEPS))
    assert "\n" not in str(refused.value) and launcher_with().find(tmp_path) is None


def test_without_slurm_the_refusal_says_where_to_submit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SubmitError, match="squeue cannot be run here: .* is this a login node?"):
        launcher_with().submit(request_of(tmp_path, SLEEPS))


def test_a_node_range_begins_with_the_nodes_that_are_there(tmp_path, slurm):
    launcher = launcher_with(nodes="1-2", exclude="node1")
    job = launcher.submit(request_of(tmp_path, ("bash", "-c", "echo $SLURMD_NODENAME $SLURM_JOB_NUM_NODES")))
    reaches(launcher, job, JobState.ENDED)
    assert "node2 1\n" in launcher.log(job, 0)[0]


def test_a_failing_preflight_keeps_the_command_from_starting_and_the_verdict_decides(tmp_path, slurm):
    request = request_of(tmp_path, LISTENS, preflight_command=("bash", "-c", "echo $SLURMD_NODENAME looked; exit 5"),
                         verdict_command=("bash", "-c", "echo verdict; exit 2"))  # fmt: skip
    launcher = launcher_with(nodes=2, preflight=True)
    job = launcher.submit(request)
    reaches(launcher, job, JobState.ENDED)
    assert starts(tmp_path) == [] and "verdict\nnot submitted again: exit code 2" in launcher.log(job, 0)[0]
    wait_until(lambda: "exit code 2:0" in launcher.explain(job), 20, "the exit code in the accounts")
    again = launcher_with(nodes=2)
    job = again.submit(dataclasses.replace(request, command=("bash", "-c", "echo $SLURMD_NODENAME works")))
    reaches(again, job, JobState.ENDED)
    text = again.log(job, 0)[0]
    assert "node1 works" in text and "node2 works" in text and "looked" not in text


def test_a_wheelhouse_becomes_an_environment_on_the_nodes_without_network(tmp_path, slurm):
    wheels = tmp_path / "my wheels"
    wheels.mkdir()
    _write_wheel(wheels, "greeting", "TEXT = 'from a wheel'")
    house = {"path": str(wheels), "requirement": "greeting", "python": sys.executable, "directory": str(tmp_path)}
    launcher = launcher_with(nodes=2, wheelhouse=house)
    ask = "import greeting, sys; print(greeting.TEXT, sys.prefix, flush=True)"
    job = launcher.submit(request_of(tmp_path / "run", ("/elsewhere/bin/python3.11", "-c", ask)))
    reaches(launcher, job, JobState.ENDED, 120)
    (environment,) = tmp_path.glob(f"vit-{os.getuid()}-*")
    assert launcher.log(job, 0)[0].count(f"from a wheel {environment}/venv\n") == 2


def _write_wheel(folder: Path, name: str, code: str) -> None:
    information = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": code,
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{information}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{information}/RECORD": record}).items():
            wheel.writestr(path, text)


@pytest.mark.parametrize(("kind", "command"), [("apptainer", "exec"), ("enroot", "start")])
def test_a_command_runs_inside_the_image_with_its_folders(tmp_path, slurm, kind, command):
    """The runtime is a stand-in that says how it was called; what is real is SLURM and the shells in between."""
    stand_in = tmp_path / "commands" / kind
    stand_in.parent.mkdir()
    run_rest = 'for word; do shift; if [ "$word" = "/my image" ]; then exec "$@"; fi; done'
    stand_in.write_text(f'#!/bin/bash\necho "[$1]" "${{*:2}}"\n{run_rest}\n')
    stand_in.chmod(0o755)
    image = {"kind": kind, "path": "/my image", "mounts": ["/data"], "python": sys.executable}
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    launcher = launcher_with(image=image, env={"PATH": path, "GREETING": "hello"})
    tell = "import os, sys; print(sys.argv[1], os.environ['GREETING'])"
    request = request_of(tmp_path / "my run", ("/elsewhere/python", "-c", tell, "the command"),
                         verdict_command=("/elsewhere/python", "-c", tell, "the verdict"))  # fmt: skip
    job = launcher.submit(request)
    reaches(launcher, job, JobState.ENDED)
    text = launcher.log(job, 0)[0]
    assert text.count(f"[{command}]") == 2 and text.count("/data:/data") == 2 and f"{request.directory}" in text
    assert "the command hello" in text and "the verdict hello" in text


def test_an_array_is_one_submission_of_many_runs(tmp_path, slurm):
    launcher = launcher_with()
    runs = [tmp_path / f"run {number}" for number in range(3)]
    requests = [request_of(run, LISTENS, key=f"key-{number}") for number, run in enumerate(runs)]
    jobs = launcher.submit_array(requests, limit=2)
    array = jobs[0].id.partition("_")[0]
    assert [job.id for job in jobs] == [f"{array}_{task}" for task in range(3)]
    assert [launcher.find(run) for run in runs] == jobs == launcher.submit_array(requests, limit=2)
    wait_until(lambda: starts(runs[0]) and starts(runs[1]), 40, "two of them running")
    assert launcher.state(jobs[2]) is JobState.PENDING and not starts(runs[2])
    launcher.cancel(jobs[0], grace_seconds=60)
    assert [launcher.state(job) for job in jobs[:2]] == [JobState.ENDED, JobState.RUNNING]
    wait_until(lambda: starts(runs[2]), 40, "the third running")
    (runs[2] / "job.json").unlink()
    assert launcher.find(runs[2]) == jobs[2]
    logs(launcher, jobs[2], "listening")
    (runs[1] / "finish").touch(), (runs[2] / "finish").touch()
    for job in jobs[1:]:
        reaches(launcher, job, JobState.ENDED)
    assert [len(starts(run)) for run in runs] == [1, 1, 1]
