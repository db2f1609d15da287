"""The batch script: golden files, shellcheck, and what a profile refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from cluster.job import JobRequest
from cluster.launchers import launcher_for
from cluster.profile import Profile, nodes_range, resolved_profile
from cluster.slurm.commands import STATES, state_of
from cluster.slurm.launcher import SlurmLauncher
from cluster.slurm.profile import SlurmProfile
from cluster.slurm.script import array_script

GOLDEN = Path(__file__).parent.parent / "golden" / "slurm"
PYTHON = "/opt/vit/bin/python"
RUN = Path("/runs/mae")
HOSTILE = Path('/runs/it\'s "mine" $HOME %j #1 \\ `x`')
EVERYTHING = {
    "nodes": "2-4", "accelerators_per_node": 0, "ranks_per_node": 2, "cpus_per_task": 32, "memory": "64G",
    "time": "2-12:00:00", "partition": "gpu,spare", "account": "vision", "qos": "high", "constraint": "h100&ib",
    "reservation": "course", "gres": "gpu:h100:2", "exclude": "node[7-9]", "dependency": "afterok:12:13",
    "directives": ["--switches=1@5:00", "--mail-type=FAIL"], "threads": 4, "cpu_bind": "cores", "umask": "0007",
    "preflight": True, "env": {"NCCL_SOCKET_IFNAME": "ib0", "GREETING": "it's \"$HOME\""},
    "modules": ["gcc/13", "cuda/12.8"], "venv": "/shared/my env",
}  # fmt: skip
CASES = {
    "two_nodes": (RUN, {"nodes": 2}),
    "everything": (RUN, EVERYTHING),
    "hostile_path": (HOSTILE, {}),
    "apptainer": (RUN, {"image": {"kind": "apptainer", "path": "/images/vit 1.sif", "mounts": ["/data", "/a:/b"]}}),
    "enroot": (RUN, {"image": {"kind": "enroot", "path": "/images/vit.sqsh", "mounts": ["/data"]}}),
    "pyxis": (RUN, {"preflight": True, "image": {"kind": "pyxis", "path": "registry/vit:1", "python": "python3.12"}}),
    "wheelhouse": (RUN, {"wheelhouse": {"path": "/shared/my wheels"}}),
}


def profile_with(**fields) -> SlurmProfile:
    return SlurmProfile.model_validate({"kind": "slurm"} | fields)


def request_in(directory: Path, key: str = "mae-0a1b2c3d") -> JobRequest:
    run = str(directory)
    return JobRequest(
        key, directory, (PYTHON, "-m", "pipeline.launch", run), {"PYTHONUNBUFFERED": "1"}, 3, directory / "unused",
        verdict_command=(PYTHON, "-m", "pipeline.verdict", run),
        preflight_command=(PYTHON, "-m", "pipeline.node_check", run), stop_lead_seconds=89.2,
    )  # fmt: skip


def rendered(case: str) -> str:
    directory, fields = CASES[case]
    return SlurmLauncher(profile_with(**fields), PYTHON).render(request_in(directory))["job.sbatch"]


def rendered_array() -> str:
    requests = [request_in(RUN, "a-1"), request_in(HOSTILE, "b-2")]
    return array_script("vit-array-1", "run /runs/mae", requests, profile_with(), 1)


@pytest.mark.parametrize("case", [*CASES, "array"])
def test_a_script_is_its_golden_file(case):
    """Look at the difference, then accept it with VIT_ACCEPT_GOLDEN=1."""
    path, text = GOLDEN / f"{case}.sbatch", rendered_array() if case == "array" else rendered(case)
    if os.environ.get("VIT_ACCEPT_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("case", [*CASES, "array"])
def test_shellcheck_finds_nothing_in_a_script(case):
    text = rendered_array() if case == "array" else rendered(case)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, "-s", "bash", "-"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_accelerators_are_asked_for_only_where_there_are_some():
    assert "#SBATCH --gpus-per-node=8\n" in rendered("two_nodes")
    assert "--gpus-per-node" not in rendered("everything")


def test_the_warning_before_the_time_limit_goes_to_the_steps():
    assert "#SBATCH --signal=USR1@90\n" in rendered("two_nodes")


def test_the_same_request_renders_the_same_text_and_writes_nothing(tmp_path):
    launcher = launcher_for("slurm", {"kind": "slurm"})
    assert launcher.render(request_in(tmp_path)) == launcher.render(request_in(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nodes": "4-2"}, "write the smaller number first: 2-4"),
        ({"nodes": 0}, "greater than or equal to 1"),
        ({"nodes": "two"}, "should match pattern"),
        ({"partition": "gpu; rm -rf /"}, "should match pattern"),
        ({"directives": ["exclusive"]}, "should match pattern"),
        ({"directives": ["--comment=a\n--uid=0"]}, "should match pattern"),
        ({"directives": ["--job-name=mine"]}, "--job-name is set by the launcher"),
        ({"directives": ["--switches=1", "--arr 0-3"]}, "--arr is set by the launcher"),
        ({"directives": ["-Jmine"]}, "-Jmine is set by the launcher"),
        ({"env": {"A B": "c"}}, "should match pattern"),
        ({"venv": "/v", "wheelhouse": {"path": "/w"}}, "venv and wheelhouse: a job has one environment"),
        ({"gpus": 8}, "Extra inputs are not permitted"),
    ],
)
def test_a_profile_says_what_is_wrong_with_it(fields, said):
    with pytest.raises(ValidationError, match=said):
        profile_with(**fields)


def test_a_profile_is_read_by_its_kind_and_knows_its_nodes():
    read = TypeAdapter(Profile).validate_python({"kind": "slurm", "nodes": "2-4"})
    assert isinstance(read, SlurmProfile) and nodes_range(read) == (2, 4)
    assert nodes_range(TypeAdapter(Profile).validate_python({"kind": "local"})) == (1, 1)


@pytest.mark.parametrize(
    ("fields", "ranks", "workers"),
    [
        ({}, 8, 8),
        ({"accelerators_per_node": 0}, 1, 1),
        ({"accelerators_per_node": 4, "cpus_per_task": 32}, 4, 7),
        ({"accelerators_per_node": 4, "cpus_per_task": 256}, 4, 16),
        ({"ranks_per_node": 2, "loader_workers": 3}, 2, 3),
    ],
)
def test_a_slurm_profile_takes_nothing_from_the_machine_that_submits(fields, ranks, workers, monkeypatch):
    monkeypatch.setattr("cluster.profile.accelerators_here", lambda: 5)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    resolved = resolved_profile(profile_with(**fields))
    assert (resolved.ranks_per_node, resolved.loader_workers) == (ranks, workers)


def test_every_state_is_in_the_table_once_and_an_unheard_one_is_unknown():
    names = [name for group in STATES.values() for name in group]
    assert len(names) == len(set(names))
    assert all(state_of(name) is state for state, group in STATES.items() for name in group)
    assert state_of("CANCELLED by 1000") is state_of("COMPLETED+") is state_of("TIMEOUT")
    assert state_of("HIBERNATING").value == state_of("").value == "unknown"


def test_what_runs_on_a_bare_compute_node_needs_only_the_standard_library():
    code = "import sys, cluster.resubmit; assert not {'pydantic', 'yaml', 'psutil'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
