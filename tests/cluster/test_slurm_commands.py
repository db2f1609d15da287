"""What is made of the answers of SLURM's commands, and of silence; stand-ins on PATH."""

import os
import shlex

import pytest

from cluster.job import Job, JobState, SubmitError
from cluster.slurm import commands, launcher
from cluster.slurm.commands import NoAnswer, queue
from tests.cluster.slurm_jobs import SLEEPS, commands_that_say, launcher_with, request_of


def test_what_has_just_not_answered_is_not_asked_again_for_the_next_run(tmp_path, monkeypatch):
    path = os.environ["PATH"]
    monkeypatch.setattr(commands, "_silences", {})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoAnswer, match="squeue cannot be run here"):  # which costs nothing, and is not remembered
        queue(names=["first"])
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    commands_that_say(tmp_path, squeue="echo squeue: error: Unable to contact slurm controller >&2; exit 1")
    for name in ("first", "second", "third"):
        with pytest.raises(NoAnswer, match="Unable to contact slurm controller"):
            queue(names=[name])
    assert (tmp_path / "asked").read_text().split() == ["squeue"]
    monkeypatch.setattr(commands, "SILENT_SECONDS", 0.0)
    commands_that_say(tmp_path, squeue="echo '7|RUNNING|None|0:01|n1|now|vit-a|run /a'")
    assert [record.id for record in queue(names=["vit-a"])] == ["7"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"venv": "/no/venv"}, "profile.venv: /no/venv/bin/python does not exist here"),
        ({"wheelhouse": {"path": "/no/wheels"}}, "profile.wheelhouse.path: /no/wheels does not exist here"),
    ],
)
def test_an_environment_that_is_not_there_is_refused_before_the_job_waits_for_its_turn(
    fields, said, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    commands_that_say(tmp_path, squeue="exit 0", sbatch="echo 7")
    with pytest.raises(SubmitError, match=said):
        launcher_with(**fields).submit(request_of(tmp_path / "run", SLEEPS))
    assert not (tmp_path / "asked").exists()
    image = {"kind": "apptainer", "path": "/no/vit.sif"}  # which the nodes may have on their own disks
    assert launcher_with(image=image).submit(request_of(tmp_path / "run", SLEEPS)).id == "7"


def test_the_runs_of_an_array_ask_for_their_states_together(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = ["9_0|RUNNING|None|0:01|n1|now|a|run /a", "9_1|PENDING|Priority|0:00||now|a|run /a"]
    commands_that_say(tmp_path, squeue=f"printf '%s\\n' {shlex.join(said)}")
    jobs = [Job("slurm", f"9_{task}", "a", 0, tmp_path) for task in range(3)]
    states = [launcher_with().state(job) for job in jobs]
    assert states == [JobState.RUNNING, JobState.PENDING, JobState.ENDED]
    assert launcher_with().explain(jobs[1]) == "SLURM job 9_1: PENDING (Priority)"
    assert (tmp_path / "asked").read_text().split() == ["squeue"]
    monkeypatch.setattr(launcher, "SHARED_SECONDS", 0.0)
    assert launcher_with().state(jobs[0]) is JobState.RUNNING
    assert (tmp_path / "asked").read_text().split() == ["squeue"] * 2


def test_an_array_runs_as_many_at_once_as_the_profile_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    commands_that_say(tmp_path, squeue="exit 0", sbatch="echo 9")
    requests = [request_of(tmp_path / name, SLEEPS, key=name) for name in "abc"]
    jobs = launcher_with(array_limit=2).submit_array(requests)
    assert [job.id for job in jobs] == ["9_0", "9_1", "9_2"]
    assert "#SBATCH --array=0-2%2\n" in (tmp_path / "a" / "submit" / "array.sbatch").read_text()
