"""The local stack for real: Prefect server, MLflow server and worker are started, used, killed and ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from flows.home import read_stack
from flows.services.deployments import PREFECT_FILE
from flows.services.processes import MARK, PART, stack_processes
from flows.services.servers import HOST, MLFLOW_PORT, PREFECT_PORT, answers
from flows.services.stack import down, status, up
from pipeline.errors import FaultError, InputError
from tests.flows.conftest import PROFILES, post

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stack(person, tmp_path_factory):
    """A stack that is up, in a home with a space in its name, on a machine where the usual ports are taken."""
    home = tmp_path_factory.mktemp("home") / "my vit"
    with contextlib.ExitStack() as taken:
        for port in (PREFECT_PORT, MLFLOW_PORT):
            with contextlib.suppress(OSError):  # taken by somebody else already: as good
                taken.enter_context(socket.create_server((HOST, port)))
        try:
            yield up(home)
        finally:
            down(home)


def test_everything_answers_on_ports_that_were_free(stack):
    home = Path(stack["home"])
    assert read_stack(home) == stack
    assert stack["pids"].keys() == {"prefect", "mlflow", "worker"}
    assert f":{PREFECT_PORT}/" not in stack["prefect_api_url"] and f":{MLFLOW_PORT}" not in stack["mlflow_url"]
    assert answers(stack["prefect_ui_url"]) and answers(stack["mlflow_url"])
    rows = status(home)
    assert [row["part"] for row in rows] == ["prefect", "mlflow", "worker"]
    assert all(row["alive"] and row["answering"] and row["pid"] for row in rows), rows


def test_every_deployment_of_the_file_is_there_and_holds_no_path(stack):
    made = post(f"{stack['prefect_api_url']}/deployments/filter", {})
    wanted = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]
    assert sorted(f"{each['entrypoint']} {each['name']}" for each in made) == sorted(
        f"{each['entrypoint']} {each['name']}" for each in wanted
    )
    assert all(each["pull_steps"] == [] and each["description"] and each["tags"] for each in made)
    encoders = {each["name"]: each["parameters"] for each in made if each["entrypoint"] == "flows.pretrain.pretrain"}
    assert encoders == {f"vit-{size}": {"encoder": f"vit_{size}"} for size in ("s16", "b16", "l16", "h14")}


def test_prefect_works_in_any_directory_without_exports(stack, tmp_path):
    command = [sys.executable, "-m", "prefect", "deployment", "ls", "--output", "json"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    names = {each["name"] for each in json.loads(listed)}
    assert names == {"vit-s16", "vit-b16", "vit-l16", "vit-h14", "images", "model", "home", "recipe", "file"}


def test_the_worker_gives_its_flows_the_home(stack):
    environment = psutil.Process(stack["pids"]["worker"]).environ()
    assert environment["VIT_HOME"] == stack["home"]
    assert environment["PREFECT_API_URL"] == stack["prefect_api_url"]


def test_an_experiment_made_through_the_server_keeps_its_artifacts_in_the_home(stack):
    api = f"{stack['mlflow_url']}/api/2.0/mlflow/experiments"
    number = post(f"{api}/create", {"name": "by http"})["experiment_id"]
    with urllib.request.urlopen(f"{api}/get?experiment_id={number}", timeout=30) as response:
        location = json.load(response)["experiment"]["artifact_location"]
    assert location == f"{(Path(stack['home']) / 'artifacts').as_uri()}/{number}"


def test_a_second_up_says_where_the_first_is(stack):
    with pytest.raises(InputError) as refused:
        up(Path(stack["home"]))
    message = str(refused.value)
    assert "\n" not in message and f"vit down --dir {stack['home']}" in message
    assert stack["prefect_ui_url"] in message and stack["mlflow_url"] in message
    assert all(row["answering"] for row in status(Path(stack["home"])))


def test_a_teams_servers_get_a_worker_and_are_left_alone(stack, person, tmp_path, monkeypatch):
    profiles = (person / "profiles.toml").read_text()
    monkeypatch.setenv("PREFECT_API_URL", stack["prefect_api_url"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack["mlflow_url"])
    lines = []
    ours = up(tmp_path, report=lines.append)
    assert (ours["prefect_api_url"], ours["mlflow_url"]) == (stack["prefect_api_url"], stack["mlflow_url"])
    assert ours["pids"].keys() == {"worker"} and sum("no server is started" in line for line in lines) == 2
    assert [(row["alive"], row["answering"]) for row in status(tmp_path)] == [(None, True), (None, True), (True, True)]
    assert down(tmp_path) >= 1
    assert all(row["answering"] for row in status(Path(stack["home"])))
    assert (person / "profiles.toml").read_text() == profiles


def test_a_stack_whose_server_was_killed_is_replaced_and_down_leaves_nothing(stack, person):
    home = Path(stack["home"])
    os.kill(stack["pids"]["prefect"], signal.SIGKILL)
    psutil.wait_procs([psutil.Process(stack["pids"]["prefect"])], timeout=10)
    assert {row["part"]: (row["alive"], row["answering"]) for row in status(home)}["prefect"] == (False, False)

    lines = []
    renewed = up(home, report=lines.append)
    assert any("has died" in line for line in lines)
    assert renewed["pids"] != stack["pids"] and all(row["answering"] for row in status(home))
    assert renewed["previous_profile"]["active"] == "team"

    # What a flow run may leave behind: a process in a session of its own that does not care for SIGTERM.
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    )
    environment = os.environ | {MARK: str(home), PART: "worker"}
    program = [sys.executable, "-c", stubborn]
    with subprocess.Popen(program, env=environment, start_new_session=True, stdout=subprocess.PIPE) as left:
        left.stdout.readline()  # it ignores SIGTERM from here on
        assert down(home, lines.append) >= 5
        assert left.wait() == -signal.SIGKILL
    assert stack_processes(home) == {} and read_stack(home) is None and status(home) == []
    assert mentioning(home) == []
    assert (person / "profiles.toml").read_text() == PROFILES
    assert down(home, lines.append) == 0 and "nothing is running" in lines[-1]


def test_a_part_that_does_not_start_is_named_with_its_log_and_nothing_stays(person, tmp_path):
    profiles = (person / "profiles.toml").read_text()
    (tmp_path / "prefect" / "prefect.db").mkdir(parents=True)
    with pytest.raises(FaultError, match="^prefect ended with exit code .*/logs/prefect.log ends with: .") as failed:
        up(tmp_path)
    assert "\n" not in str(failed.value)
    assert stack_processes(tmp_path) == {} and read_stack(tmp_path) is None
    assert (person / "profiles.toml").read_text() == profiles


def test_a_teams_server_that_does_not_answer_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://{HOST}:9/api")
    with pytest.raises(InputError, match="PREFECT_API_URL=.* does not answer"):
        up(tmp_path)
    assert stack_processes(tmp_path) == {}


def test_a_temporary_server_serves_this_process_and_ends_with_it(person, tmp_path):
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flows.services.temporary_server import prefect_server\n"
        "with prefect_server(Path(sys.argv[1])) as url:\n"
        "    from prefect.client.orchestration import get_client\n"
        "    client = get_client(sync_client=True)\n"
        "    assert client.api_healthcheck() is None and str(client.api_url).rstrip('/') == url\n"
        "    print(url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as using:
        url = using.stdout.readline().strip()
        assert answers(f"{url}/health")
        using.send_signal(signal.SIGTERM)
        assert using.wait(timeout=30) == 128 + signal.SIGTERM
    assert not answers(f"{url}/health") and stack_processes(tmp_path) == {}
    assert (tmp_path / "prefect" / "prefect.db").exists()


def mentioning(home):
    """The command lines of living processes that carry the home in their arguments or environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(home) in word for word in words):
                found.append(process.cmdline())
    return found
