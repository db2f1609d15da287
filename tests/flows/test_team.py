"""A team's servers for real: PostgreSQL, Prefect, MLflow and a worker, used by two people of one group in one home.

Secrets are planted in both people's environments and in a URL; at the end nothing that was written holds one.
"""

import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from flows.services.servers import answers
from pipeline.ports import free_port
from tests.flows.people import GROUP, Person, two_people
from tests.flows.postgres import Postgres
from tests.flows.readme import block

pytestmark = [pytest.mark.postgres, pytest.mark.slow]
NAME = "vit-login01"  # the machine, as people call it; no DNS knows it, so it stands behind localhost in the profile
PREFECT_SECRET, ADA, BOB = "team:c4n4ry-prefect-1", "c4n4ry-ada-123456", "c4n4ry-bob-123456"
CANARIES = {
    "WANDB_API_KEY": "c4n4ry-wandb-0123456789abcdef", "HF_TOKEN": "hf_c4n4ryc4n4ryc4n4ryc4n4ryc4n4ry1",
    "AWS_ACCESS_KEY_ID": "AKIAC4N4RYC4N4RY1234", "AWS_SECRET_ACCESS_KEY": "c4n4ry/aws+0123456789",
    "MY_DATABASE_URL": "postgresql://me:c4n4ry-database@db/x",
}  # fmt: skip
ON_ONE_RANK = ("--set", "profile.ranks_per_node=1", "--set", "profile.loader_workers=0")
SMALL = (
    "--set", "encoder.embed_dim=12", "--set", "encoder.depth=1", "--set", "encoder.drop_path_rate=0",
    "--set", "steps=2", "--set", "checkpoint.every_steps=1", *ON_ONE_RANK,
)  # fmt: skip


@dataclass
class Team:
    """A stack that Ada started, in a home of the group's."""

    ada: Person
    bob: Person
    home: Path
    profile: Path
    prefect: str
    mlflow: str
    postgres: Postgres
    data: Path

    def mlflow_as_bob(self) -> str:
        """The address with Bob's password in it, as some people write it."""
        return self.mlflow.replace("://", f"://bob:{BOB}@")


@pytest.fixture(scope="module")
def team(postgres, digits):
    folder = Path(tempfile.mkdtemp(prefix="team-"))  # pytest's own folders are closed to others
    folder.chmod(0o755)
    with two_people(folder) as (ada, bob):
        home, data = folder / "home", folder / "digits"
        home.mkdir()
        if ada.user:
            shutil.chown(home, ada.user, GROUP)
        home.chmod(0o2770)  # what README has a group do
        shutil.copytree(digits, data)
        subprocess.run(["chmod", "-R", "a+rX", str(data)], check=True)
        ports = [free_port(), free_port()]
        profile = _profile(folder / "team.yaml", postgres, ("prefect", "mlflow"), ports)
        shared = {"VIT_HOME": str(home), "PREFECT_API_AUTH_STRING": PREFECT_SECRET} | CANARIES
        ada.environment = shared | {"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": ADA}
        bob.environment = dict(shared)
        urls = [f"http://localhost:{ports[0]}/api", f"http://localhost:{ports[1]}"]
        try:
            ada.run("vit", "up", "--profile", str(profile), VIT_DATABASE_PASSWORD=postgres.password)
            ada.run("bash", "-c", block("make a user of MLflow"), MLFLOW_TRACKING_URI=urls[1])
            users = f"{urls[1]}/api/2.0/mlflow/users/update-password"
            _post(users, {"username": "bob", "password": BOB}, f"ada:{ADA}", method="PATCH")
            yield Team(ada, bob, home, profile, *urls, postgres, data)
        finally:
            ada.run("vit", "down")
            shutil.rmtree(folder, ignore_errors=True)


def _profile(path: Path, postgres: Postgres, databases: tuple[str, str], ports: list[int]) -> Path:
    servers = {
        part: {"database": postgres.new_database(name), "password_variable": "VIT_DATABASE_PASSWORD", "port": port}
        for part, name, port in zip(("prefect", "mlflow"), databases, ports, strict=True)
    }
    servers["mlflow"]["workers"] = 1  # each takes seconds to start
    path.write_text(yaml.safe_dump({"kind": "team", "hosts": ["localhost", NAME, "*.svc.cluster.local"]} | servers))
    return path


def _post(url: str, body: dict, secret: str | None = None, method: str = "POST", **headers: str) -> dict:
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
    if secret:
        request.add_header("Authorization", "Basic " + base64.b64encode(secret.encode()).decode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read() or "{}")


def _refusal(*arguments, **headers) -> int:
    with pytest.raises(urllib.error.HTTPError) as refused:
        _post(*arguments, **headers)
    return refused.value.code


def test_nobody_is_answered_without_a_password_or_under_a_foreign_name(team):
    runs, experiments = f"{team.prefect}/flow_runs/filter", f"{team.mlflow}/api/2.0/mlflow/experiments/search"
    wanted = {"max_results": 1}
    assert _refusal(runs, {}) == _refusal(runs, {}, "team:wrong") == 401
    assert _refusal(experiments, wanted) == _refusal(experiments, wanted, "ada:wrong-password") == 401
    assert _post(runs, {}, PREFECT_SECRET) == []
    for host in (NAME, f"{NAME}:5000", "mlflow.ours.svc.cluster.local:5000"):
        assert _post(experiments, wanted, f"ada:{ADA}", Host=host)
    assert _refusal(experiments, wanted, f"ada:{ADA}", Host="elsewhere.example.org") == 403
    for page in (f"{team.prefect}/health", team.prefect.replace("/api", "/docs"), f"{team.mlflow}/health"):
        assert answers(page, timeout_seconds=30), page
    page = {"Origin": "http://elsewhere.example.org"}
    assert _refusal(f"{experiments.removesuffix('search')}create", {"name": "x"}, f"ada:{ADA}", **page) == 403


def test_the_servers_listen_for_others_and_no_secret_is_in_their_command_lines(team):
    record = json.loads((team.home / "stack.json").read_text())
    assert record["servers"] == "team" and record["pids"].keys() == {"prefect", "mlflow", "worker"}
    lines = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    shown = [line for line in lines.splitlines() if " mlflow server " in line and str(team.home) in line]
    assert shown and "--host 0.0.0.0" in shown[0] and team.postgres.password not in lines and ADA not in lines


def test_who_gives_no_password_is_told_which_and_trains_nothing_unseen(team):
    lines = team.bob.run("vit", "status", PREFECT_API_AUTH_STRING="").stdout.splitlines()
    assert [line.split()[3:5] for line in lines] == [["True", "False"]] * 3  # they live, and do not answer him
    assert "asks for a user and password (401); set PREFECT_API_AUTH_STRING" in lines[0]
    assert "(401); set MLFLOW_TRACKING_USERNAME" in lines[1]
    refused = team.bob.run("vit", "models", fails=True)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "(401)" in refused.stderr
    wrong = team.mlflow.replace("://", "://bob:c4n4ry-wrong-12345@")
    refused = team.bob.run("vit", "models", fails=True, MLFLOW_TRACKING_URI=wrong)
    assert "does not know you (401)" in refused.stderr and "c4n4ry" not in refused.stderr


def test_bob_sees_adas_servers_and_cannot_end_them(team):
    lines = team.bob.run("vit", "status", MLFLOW_TRACKING_URI=team.mlflow_as_bob()).stdout.splitlines()
    assert [line.split()[3:5] for line in lines] == [["True", "True"]] * 3
    if team.ada.user is None:
        pytest.skip("one user cannot be two; run as root")
    for command in (["down"], ["up", "--profile", str(team.profile)]):
        refused = team.bob.run("vit", *command, fails=True, MLFLOW_TRACKING_USERNAME="bob",
                               MLFLOW_TRACKING_PASSWORD=BOB, VIT_DATABASE_PASSWORD="none")  # fmt: skip
        assert refused.returncode == 2 and "vit-ada" in refused.stderr, refused.stderr
    pid = json.loads((team.home / "stack.json").read_text())["pids"]["mlflow"]
    assert "Permission denied" in team.bob.run("cat", f"/proc/{pid}/environ", fails=True).stderr
    assert "Permission denied" in team.bob.run("ls", str(team.ada.directory), fails=True).stderr


def test_another_password_of_the_administrator_is_refused_before_a_server_starts(team):
    profile, second = yaml.safe_load(team.profile.read_text()), team.profile.with_name("second.yaml")
    for part in ("prefect", "mlflow"):
        profile[part]["port"] = free_port()
    second.write_text(yaml.safe_dump(profile))
    home = team.ada.directory / "second"
    other = {"VIT_DATABASE_PASSWORD": team.postgres.password, "MLFLOW_TRACKING_PASSWORD": "c4n4ry-of-today"}
    refused = team.ada.run("vit", "up", "--dir", str(home), "--profile", str(second), fails=True, **other)
    assert refused.returncode == 2 and not (home / "logs").exists() and "c4n4ry" not in refused.stderr
    (line,) = refused.stderr.splitlines()
    assert line.startswith("mlflow: MLFLOW_TRACKING_PASSWORD is not the password of ada: ") and "first start" in line


@pytest.fixture(scope="module")
def used(team):
    """The run that Bob trained and evaluated, his password in MLflow's URL, and that Ada had her worker register."""
    team.bob.environment["MLFLOW_TRACKING_URI"] = team.mlflow_as_bob()
    team.bob.environment["PREFECT_API_URL"] = team.prefect.replace("://", f"://{PREFECT_SECRET}@")
    del team.bob.environment["PREFECT_API_AUTH_STRING"]
    team.bob.run("vit", "pretrain", "pretrain_supervised_debug", "--data", str(team.data), *SMALL)
    (run,) = (path.name for path in (team.home / "runs").glob("pretrain_*"))
    team.bob.run("vit", "evaluate", run, "--data", str(team.data), "--protocol", "classify-v1", *ON_ONE_RANK)
    _register(team, run)
    return run


def _register(team: Team, run: str) -> None:
    """Have Ada's worker do it, and wait for the end."""
    wanted = {"deployments": {"name": {"any_": ["model"]}}, "flows": {"name": {"any_": ["register"]}}}
    (deployment,) = _post(f"{team.prefect}/deployments/filter", wanted, PREFECT_SECRET)
    asked = {"parameters": {"model": run, "name": "digits"}}
    made = _post(f"{team.prefect}/deployments/{deployment['id']}/create_flow_run", asked, PREFECT_SECRET)
    wanted = {"flow_runs": {"id": {"any_": [made["id"]]}}}
    deadline = time.monotonic() + 400
    state = "PENDING"
    while state in ("SCHEDULED", "PENDING", "RUNNING") and time.monotonic() < deadline:
        time.sleep(0.5)
        state = _post(f"{team.prefect}/flow_runs/filter", wanted, PREFECT_SECRET)[0]["state_type"]
    if state != "COMPLETED":
        verdicts = [path.read_text() for path in team.home.glob("runs/register-*/attempts/*/exit/*.json")]
        logs = [path.read_text() for path in team.home.glob("runs/register-*/attempts/*/log/*.log")]
        pytest.fail("\n".join([state, *verdicts, *logs]))


def test_what_one_person_trains_the_other_sees_and_may_go_on_with(team, used):
    assert f"{used}" in team.ada.run("vit", "runs").stdout
    listed = team.ada.run("vit", "models").stdout
    assert "models:/digits/1" in listed and "champion" in listed and "classify-v1" in listed
    run = team.home / "runs" / used
    if team.ada.user is not None:
        assert {run.owner(), next((team.home / "runs").glob("register-*")).owner()} == {"vit-ada", "vit-bob"}
        for path in [run, *run.rglob("*")]:
            mode = path.stat().st_mode
            assert path.group() == GROUP and mode & 0o060 == 0o060 and not mode & 0o007, f"{path} {oct(mode)}"
    team.ada.run("rm", "-r", str(run / "result.json"), str(run / "checkpoints" / "step-00000002"))
    assert "step 2/2" in team.ada.run("vit", "resume", used).stdout and run.joinpath("attempts/02").is_dir()


def test_the_run_of_the_deployment_is_completed_in_prefect_and_bobs_commands_are_shown_there(team, used):
    found = _post(f"{team.prefect}/flow_runs/filter", {}, PREFECT_SECRET)
    states = {each["name"]: each["state_type"] for each in found}
    assert states[used] == "COMPLETED" and states["register-digits"] == "COMPLETED", states


def test_nothing_that_was_written_holds_a_secret(team, used):
    for profile in ("local", "slurm"):  # the scripts that would be submitted
        command = ["vit", "pretrain", "pretrain_mae_debug", "--data", str(team.data), "--profile", profile, "--dry-run"]
        team.bob.run(*command, "--set", "profile.nodes=1", "--set", "profile.ranks_per_node=2")
    assert {path.name for path in team.home.glob("runs/*/submit/*")} >= {"job.sh", "job.sbatch"}
    secret = base64.b64encode(PREFECT_SECRET.encode())
    needles = [b"c4n4ry", b"C4N4RY", secret, team.postgres.password.encode()]
    looked = 0
    for folder in (team.home, team.ada.directory, team.bob.directory):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                content, looked = path.read_bytes(), looked + 1
                assert not any(needle in content for needle in needles), f"{path} holds a secret"
    assert looked > 50
    for database in ("prefect", "mlflow"):
        dump = team.postgres.run("pg_dump", "--inserts", database)
        lines = [line for line in dump.splitlines() if any(needle.decode() in line for needle in needles)]
        assert "INSERT INTO" in dump and lines == []
    provenance = json.loads((team.home / "runs" / used / "provenance.json").read_text())
    assert provenance["command"][1:3] == ["pretrain", "pretrain_supervised_debug"]


def test_a_secret_in_a_setting_is_refused_before_anything_is_written(team):
    for setting, said in (
        (f"profile.env.SOME_NAME={CANARIES['WANDB_API_KEY']}", "WANDB_API_KEY"),
        ("profile.env.WANDB_API_KEY=abc", "env: WANDB_API_KEY: a secret would stand in profile.yaml"),
        ("checkpoint.mirror=s3://key:c4n4ry-of-s3@bucket/x", "credentials"),
    ):
        command = ["vit", "pretrain", "pretrain_supervised_debug", "--data", str(team.data), "--set", setting]
        refused = team.ada.run(*command, "--dry-run", fails=True)
        assert refused.returncode == 2 and said in refused.stderr and not re.search("c4n4ry", refused.stderr)


def test_databases_and_home_are_backed_up_while_they_run_and_restored_elsewhere(team, used, tmp_path_factory):
    folder = team.profile.parent
    backup, restored = folder / "backup", folder / "restored"
    backup.mkdir()
    profile = yaml.safe_load(team.profile.read_text())
    for part in ("prefect", "mlflow"):
        profile[part] |= {"database": team.postgres.url(f"{part}_restored"), "port": free_port()}
    (folder / "restored.yaml").write_text(yaml.safe_dump(profile))
    for place in (backup, restored, folder):
        place.mkdir(exist_ok=True)
        if team.ada.user:
            shutil.chown(place, team.ada.user)
    tools = {name: value for name, value in team.postgres.environment.items() if name.startswith("PG")}
    path = f"{team.postgres.programs}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/bin"
    ours = tools | {"BACKUP": str(backup), "RESTORED": str(restored), "PATH": path}
    ours |= {"VIT_DATABASE_PASSWORD": team.postgres.password}
    team.ada.run("bash", "-c", block("back up a team's"), **ours)
    inside = {"HOME": str(team.ada.directory)}
    try:
        team.ada.run("bash", "-c", f"cd {folder}; {block('restore a team')}", **ours, **inside)
        there = {"VIT_HOME": str(restored)}
        assert used in team.ada.run("vit", "runs", **there).stdout
        assert "models:/digits/1" in team.ada.run("vit", "models", **there).stdout
        uri = json.loads((restored / "team.json").read_text())["mlflow_url"]
        assert uri != team.mlflow
        load = (
            "import mlflow, numpy as np; model = mlflow.pyfunc.load_model('models:/digits@champion'); "
            "print(model.predict([np.zeros((32, 32, 3), np.uint8)]).shape)"
        )
        assert "(1, 10)" in team.ada.run(sys.executable, "-c", load, MLFLOW_TRACKING_URI=uri).stdout
        runs = [team.postgres.run("psql", "-Atc", "select count(*) from flow_run where state_type = 'COMPLETED'", name)
                for name in ("prefect", "prefect_restored")]  # fmt: skip
        assert runs[0] == runs[1] != "0\n"
    finally:
        team.ada.run("vit", "down", "--dir", str(restored))
