"""What a team's profile refuses, in a line each; how URLs lose their passwords; who owns a stack; a group's umask."""

import os
import socket

import pytest
import yaml

from flows.command_line.services import _asked_for, down_command
from flows.credentials import without_passwords_in_urls
from flows.home import home_directory, team_servers, tracking_uri, write_team_servers
from flows.services.deployments import PREFECT_FILE, for_pool, give_profile
from flows.services.ownership import owner, require_ours
from flows.services.stack import up
from flows.services.team import load_team, mlflow_arguments, prefect_settings
from pipeline.errors import InputError
from pipeline.ports import free_port

SECRETS = {
    "VIT_DATABASE_PASSWORD": "db-c4n4ry", "PREFECT_API_AUTH_STRING": "team:c4n4ry", "MLFLOW_TRACKING_USERNAME": "ada",
    "MLFLOW_TRACKING_PASSWORD": "c4n4ry-of-ada",
}  # fmt: skip
URLS = {"PREFECT_API_URL": "http://team:4200/api", "MLFLOW_TRACKING_URI": "http://team:5000"}
SERVER = {"database": "postgresql://vit@db/x", "password_variable": "VIT_DATABASE_PASSWORD"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*URLS, "PGUSER", "PGPASSWORD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def written(folder, **keys):
    (folder / "ours.yaml").write_text(yaml.safe_dump({"kind": "team", "prefect": SERVER, "mlflow": SERVER} | keys))
    return str(folder / "ours.yaml")


def refusal(profile):
    with pytest.raises(InputError) as refused:
        load_team(profile)
    assert "c4n4ry" not in str(refused.value)
    return refused.value.problems


def test_the_shipped_profile_and_a_file_are_read_and_local_is_none(tmp_path):
    assert load_team("local") is None
    assert load_team("team").prefect.database == "postgresql://vit@localhost/prefect"
    assert load_team(written(tmp_path, hosts=["login01"])).host == "login01"


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_is_missing_is_named(name, environment, tmp_path):
    environment.delenv(name)
    lines = refusal(written(tmp_path))
    assert lines and all(line.startswith("ours.yaml: ") and f"{name} is not set" in line for line in lines)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"prefect": SERVER | {"database": "postgresql://vit:c4n4ry@db/x"}}, "holds a password"),
        ({"prefect": SERVER | {"database": "sqlite:////tmp/x.db"}}, "postgresql://USER@HOST/NAME"),
        ({"prefect": SERVER | {"port": 0}}, "prefect.port"),
        ({"mlflow": SERVER | {"artifacts": "artifacts"}}, "not an absolute path"),
        ({"mlflow": SERVER | {"artifacts": "s3://key:c4n4ry@bucket"}}, "without credentials"),
        ({"mlflow": SERVER | {"artefacts": "/x"}}, "artefacts"),
        ({"hosts": ["http://login01"]}, "hosts"),
        ({"pool": "a pool"}, "pool"),
        ({"prefect": None}, "export PREFECT_API_URL=URL"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(keys, said, tmp_path):
    lines = refusal(written(tmp_path, **keys))
    assert len(lines) == 1 and said in lines[0] and "ours.yaml" in lines[0], lines


def test_a_profile_of_runs_or_of_nothing_starts_no_servers(tmp_path):
    (tmp_path / "mine.yaml").write_text("kind: slurm\n")
    assert "say `kind: team`" in refusal(str(tmp_path / "mine.yaml"))[0]
    assert "say local, team, or a path" in refusal("teem")[0]


def test_short_passwords_and_half_auth_strings_are_refused(environment, tmp_path):
    environment.setenv("MLFLOW_TRACKING_PASSWORD", "short")
    environment.setenv("PREFECT_API_AUTH_STRING", "word")
    first, second = refusal(written(tmp_path))
    assert "not of the form user:password" in first and "shorter than 12 characters" in second


def test_drivers_that_are_not_installed_are_named_before_a_server_starts(environment, tmp_path):
    environment.setattr("importlib.util.find_spec", lambda name: None)
    lines = refusal(written(tmp_path, mlflow=SERVER | {"artifacts": "s3://bucket/vit"}))
    assert lines == [
        f"ours.yaml: mlflow: needs {name}, not installed: uv sync --extra server"
        for name in ("psycopg", "flask_wtf", "boto3")
    ]
    environment.setenv("MLFLOW_TRACKING_URI", URLS["MLFLOW_TRACKING_URI"])
    assert refusal(written(tmp_path)) == ["ours.yaml: prefect: needs psycopg, not installed: uv sync --extra server"]


def test_a_machine_of_workers_needs_no_secret_of_the_servers(environment, tmp_path):
    for name, value in URLS.items():
        environment.setenv(name, value)
    for name in ("VIT_DATABASE_PASSWORD", "MLFLOW_TRACKING_PASSWORD"):
        environment.delenv(name)
    (tmp_path / "west.yaml").write_text("kind: team\npool: west\ndeployment_suffix: -west\n")
    assert load_team(str(tmp_path / "west.yaml")).pool == "west"


def test_secrets_reach_the_servers_by_environment_alone(tmp_path):
    team = load_team(written(tmp_path, hosts=["login01", "*.svc.cluster.local"]))
    settings, arguments = prefect_settings(team, team.prefect), " ".join(mlflow_arguments(team, team.mlflow, tmp_path))
    assert settings["PGPASSWORD"] == "db-c4n4ry" and "c4n4ry" not in arguments
    assert settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == "postgresql+asyncpg://vit@db/x"
    assert "login01:*" in arguments and "*.svc.cluster.local:*" in arguments and "basic-auth" in arguments


def test_a_port_that_is_taken_is_not_exchanged_for_another(tmp_path):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        team = load_team(written(tmp_path, prefect=SERVER | {"port": port}))
        with pytest.raises(InputError, match=f"prefect.port {port} on 0.0.0.0: .*choose another"):
            up(tmp_path / "home", team=team)


def closed(folder, **server):
    """What `vit up` says of a database, before anything is started."""
    ours = {part: SERVER | {"port": free_port()} | server for part in ("prefect", "mlflow")}
    team = load_team(written(folder, listen="127.0.0.1", **ours))
    with pytest.raises(InputError) as refused:
        up(folder / "home", team=team)
    assert not (folder / "home" / "logs").exists() and "c4n4ry" not in str(refused.value)
    (line,) = refused.value.problems
    return line


def test_a_database_that_is_down_is_named_before_a_server_starts(tmp_path):
    url = f"postgresql://vit@127.0.0.1:{free_port()}/x"
    line = closed(tmp_path, database=url)
    assert line.startswith(f"prefect.database {url}: Connection refused") and "is PostgreSQL running there" in line


@pytest.mark.postgres
def test_a_wrong_password_of_a_database_and_a_database_that_is_missing_are_named(postgres, environment, tmp_path):
    url = postgres.url("missing")
    line = closed(tmp_path, database=url)
    assert line.startswith(f'prefect.database {url}: password authentication failed for user "vit"; ')
    assert "environment variable VIT_DATABASE_PASSWORD (prefect.password_variable)" in line
    environment.setenv("VIT_DATABASE_PASSWORD", postgres.password)
    assert closed(tmp_path, database=url).endswith('database "missing" does not exist; make it: createdb missing')


def test_another_pool_has_deployments_of_its_own():
    content = yaml.safe_load(PREFECT_FILE.read_text())
    made = for_pool(content, "west", "-west")
    assert {each["work_pool"]["name"] for each in made["deployments"]} == {"west"}
    assert [each["name"] for each in made["deployments"]] == [f"{each['name']}-west" for each in content["deployments"]]


def test_deployments_of_a_cluster_train_there_by_default(environment, tmp_path):
    for name, value in URLS.items():
        environment.setenv(name, value)
    path = tmp_path / "west.yaml"
    path.write_text("kind: team\npool: kubernetes\nprofile: kubernetes\n")
    assert load_team(str(path)).profile == "kubernetes"

    from flows.pretrain import pretrain
    from flows.register import register

    first, second = {"name": "a", "parameters": {"encoder": "vit_s16"}}, {"name": "b"}
    for deployment, flow in ((first, pretrain), (second, register)):  # a registration does not ask where
        give_profile(deployment, flow, "kubernetes")
    assert first["parameters"] == {"profile": "kubernetes", "encoder": "vit_s16"} and second == {"name": "b"}
    give_profile(plain := {"name": "c"}, pretrain, "")
    assert plain == {"name": "c"}
    for wrong, said in (("kubernets", "is no profile of runs; say"), ("mine.yaml", "is not an absolute path")):
        path.write_text(f"kind: team\nprofile: {wrong}\n")
        (line,) = refusal(str(path))
        assert "profile" in line and said in line


def test_what_the_servers_that_were_started_ask_for_is_said_and_of_others_nothing():
    assert _asked_for({"worker"}) == ""
    assert _asked_for({"worker", "prefect"}) == "PREFECT_API_AUTH_STRING"
    words = "PREFECT_API_AUTH_STRING, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    assert _asked_for({"worker", "prefect", "mlflow"}) == words


def test_a_home_that_stays_a_teams_says_so_when_its_worker_ends_and_how_to_undo_it(tmp_path):
    write_team_servers(tmp_path, URLS["PREFECT_API_URL"], URLS["MLFLOW_TRACKING_URI"])
    lines: list[str] = []
    down_command(str(tmp_path), lines.append)
    assert f"{tmp_path} stays a team's" in lines[-1] and lines[-1].endswith(f"rm {tmp_path / 'team.json'}")
    (tmp_path / "team.json").unlink()
    down_command(str(tmp_path), lines.append)
    assert lines[-1] == f"nothing is running in {tmp_path}"


def test_passwords_in_urls_move_to_where_clients_look(environment):
    environment.setenv("PREFECT_API_URL", "http://team:p%40ss@host:4200/api")
    environment.setenv("MLFLOW_TRACKING_URI", "https://bob:word@host/mlflow")
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        environment.delenv(name)
    without_passwords_in_urls()
    names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD")
    assert [os.environ[name] for name in names] == [
        "http://host:4200/api", "team:p@ss", "https://host/mlflow", "word",
    ]  # fmt: skip


def test_a_database_whose_password_has_no_other_place_is_refused(environment):
    environment.setenv("MLFLOW_TRACKING_URI", "mysql://bob:c4n4ry@db/mlflow")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI: holds a password") as refused:
        without_passwords_in_urls()
    assert "c4n4ry" not in str(refused.value)


def test_a_home_of_a_team_is_its_servers_also_while_they_are_down(environment, tmp_path):
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    write_team_servers(tmp_path, URLS["PREFECT_API_URL"], URLS["MLFLOW_TRACKING_URI"])
    assert tracking_uri(tmp_path) == URLS["MLFLOW_TRACKING_URI"] and team_servers(tmp_path)["format"] == 1
    with pytest.raises(InputError, match="its records are in its team's servers.*--profile team"):
        up(tmp_path)


def test_a_stack_that_is_dead_or_heard_of_no_more_is_anybodys_to_replace(tmp_path):
    stack = owner() | {"prefect_api_url": "http://127.0.0.1:9/api", "pids": {"worker": os.getppid()}, "worker": "w"}
    require_ours(tmp_path, stack | {"user": "grace", "started": {"worker": 0.0}}, "end")  # dead: nobody's
    require_ours(tmp_path, stack | {"started": {}, "pids": {}}, "end")
    require_ours(tmp_path, stack | {"host": "elsewhere"}, "end")  # heard of no more


@pytest.mark.parametrize(("mode", "made"), [(0o755, 0o644), (0o2770, 0o660), (0o2775, 0o664)])
def test_in_a_home_of_a_group_new_files_are_the_groups(mode, made, tmp_path):
    before = os.umask(0o022)
    try:
        (home := tmp_path / "home").mkdir()
        home.chmod(mode)
        home_directory(str(home))
        (home / "file").touch()
        assert (home / "file").stat().st_mode & 0o777 == made
    finally:
        os.umask(before)
