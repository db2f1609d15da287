"""Flow, worker and server are killed one after the other under a real job; it lives on and is watched to its end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.orchestration.watchers import WatcherNote
from flows.services.processes import stack_processes
from flows.services.servers import (
    answers,
    local_prefect_environment,
    own_environment,
    start_prefect_server,
    start_worker,
    wait_for,
)
from flows.services.stack import down, up
from pipeline.run_directory import RunDirectory, read_json
from tests.flows.conftest import post
from tests.flows.test_slurm import SETTINGS as ON_TWO_NODES

pytestmark = pytest.mark.slow
LONG = ["steps=100000", "checkpoint.every_steps=50000"]


SILENT = """
import os, signal
from prefect import flow

@flow(name="vit silent")
def silent():
    import time
    time.sleep(5)  # its heartbeat is on its way
    os.kill(os.getpid(), signal.SIGKILL)

silent()
"""

SLOTS = """
import sys, threading
from flows.orchestration.limits import slot_of
from pipeline.run_directory import RunDirectory

run, cancelled = RunDirectory(sys.argv[1]), threading.Event()
with slot_of(run, print, cancelled):
    print("first in", flush=True)
    with slot_of(run, lambda line: (print(line), cancelled.set()), cancelled):
        print("second cancelled")
with slot_of(run, print, threading.Event()):
    print("third in")
"""


@pytest.fixture(scope="module")
def stack(person, tmp_path_factory):
    """A stack that is up, its scheduled reconciliation paused: here it is done when the test says so."""
    home = tmp_path_factory.mktemp("home")
    try:
        made = up(home)
        deployment = deployment_id(made, "reconcile/home")
        request(made, f"deployments/{deployment}/pause_deployment", {})
        yield made
    finally:
        down(home)


@pytest.fixture(scope="module")
def silent(stack):
    """A flow run whose process was killed after its first heartbeat, without anybody to tell of it."""
    environment = {"PREFECT_API_URL": stack["prefect_api_url"], "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    subprocess.run([sys.executable, "-c", SILENT], env=os.environ | environment, capture_output=True, timeout=120)
    (found,) = request(stack, "flow_runs/filter", {"flows": {"name": {"any_": ["vit silent"]}}})
    assert found["state"]["type"] == "RUNNING"
    return found["id"]


def request(stack, path, body=None):
    url = f"{stack['prefect_api_url']}/{path}"
    if body is not None:
        http = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    else:
        http = urllib.request.Request(url)
    with urllib.request.urlopen(http, timeout=30) as response:
        content = response.read()
        return json.loads(content) if content else None


def deployment_id(stack, name):
    return request(stack, f"deployments/name/{name}")["id"]


def run_deployment(stack, digits, *settings, **parameters):
    given = {"encoder": "debug", "objective": "mae", "data": str(digits), "set": [*settings]} | parameters
    body = {"state": {"type": "SCHEDULED", "name": "Scheduled"}, "parameters": given}
    return post(
        f"{stack['prefect_api_url']}/deployments/{deployment_id(stack, 'pretrain/vit-s16')}/create_flow_run", body
    )["id"]


def state(stack, flow_run):
    found = request(stack, f"flow_runs/{flow_run}")
    return found["state"]["type"], found["state"]["message"], found["run_count"]


def note(stack, flow_run):
    return WatcherNote(Path(stack["home"]), flow_run)


def watcher_pid(stack, flow_run):
    content = read_json(note(stack, flow_run).path)
    return int(content["process"].partition(":")[0]) if content else None


def wait(holds, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


def training_run(stack, flow_run) -> RunDirectory:
    """The run of a flow run, once its ranks have made a step."""
    (run,) = wait(lambda: note(stack, flow_run).runs(), "the flow run watches no run")
    wait(lambda: any(run.path.glob("attempts/*/metrics.jsonl")), f"{run.path} does not train")
    return run


def ranks_of(run):
    supervisor = psutil.Process(int(read_json(run.job_file)["id"].partition(":")[0]))
    return supervisor, [each for each in supervisor.children(recursive=True) if "pipeline." in " ".join(each.cmdline())]


def works(process):
    """Whether it runs; one that has ended may wait for a parent that does not ask."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def kill(pid):
    process = psutil.Process(pid)
    process.kill()
    process.wait(timeout=20)


def reconcile(stack):
    command = [sys.executable, "-m", "flows", "reconcile", "--dir", stack["home"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def reconciled_until(stack, words):
    """Reconcile until it says so: what a worker is still telling of is left to the next time."""
    wait(lambda: any(words in line for line in reconcile(stack)), f"never said: {words}")


def restarted_worker(stack):
    home = Path(stack["home"])
    environment = own_environment() | local_prefect_environment(home, stack["prefect_api_url"])
    return start_worker(home, stack["worker"], environment)


def restarted_server(stack, home):
    server = start_prefect_server(home, int(re.search(r":(\d+)/api", stack["prefect_api_url"])[1]))
    wait_for("prefect", lambda: answers(f"{stack['prefect_api_url']}/health"), {"prefect": server}, home)


def server_of(stack):
    return oldest(stack, "prefect", "server")


def worker_of(stack):
    return oldest(stack, "worker", "worker")


def oldest(stack, part, word):
    """The number of the oldest living process of a part of the stack with this word in its command."""
    parts = [each for each, its_part in stack_processes(Path(stack["home"])).items() if its_part == part]
    return min((each for each in parts if word in each.cmdline()), key=lambda each: each.create_time()).pid


def held_ranks(run):
    """The ranks of a run, wherever they were started from, suspended: the job stands still while its watchers die."""
    wanted = ["pipeline.pretrain", str(run.path)]
    ranks = [each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [])[-2:] == wanted]
    for rank in ranks:
        rank.suspend()
    return ranks


def die_in_turn(stack, flow_run, run):
    """Kill the flow, then worker and flow, then the server; each time the run is watched again, by the same flow run.

    Its job goes on when the server is away, and ends; when the server is back, the flow says so.
    """
    home = Path(stack["home"])
    ranks = held_ranks(run)
    kill(watcher_pid(stack, flow_run))
    wait(lambda: state(stack, flow_run)[0] == "CRASHED", "the worker did not notice that its flow is gone")
    reconciled_until(stack, "Crashed in Prefect, now AwaitingRetry: its process is gone and")
    wait(lambda: note(stack, flow_run).lives(), "no worker took the flow run up again")
    assert not any("flow run" in line or "no flow watches it" in line for line in reconcile(stack))

    worker, flow = worker_of(stack), watcher_pid(stack, flow_run)
    os.kill(worker, signal.SIGKILL)
    kill(flow)
    assert state(stack, flow_run)[0] == "RUNNING" and all(map(works, ranks))
    restarted_worker(stack)
    reconciled_until(stack, "Running in Prefect, now AwaitingRetry")
    wait(lambda: note(stack, flow_run).lives(), "the new worker did not take the flow run up")

    flow = watcher_pid(stack, flow_run)
    kill(server_of(stack))
    for rank in ranks:
        assert works(rank)
        rank.resume()
    wait(run.result_file.exists, "the job did not end")
    assert any("no Prefect API answers" in line for line in reconcile(stack))
    assert psutil.pid_exists(flow), "the flow died of an API that is away"
    restarted_server(stack, home)
    wait(lambda: state(stack, flow_run)[0] == "COMPLETED", "the flow did not say that the run is done")

    assert state(stack, flow_run)[2] == 3
    assert [path.name for path in run.attempts.iterdir()] == ["01"] and not note(stack, flow_run).path.exists()
    assert reconcile(stack) == []


def test_flow_worker_and_server_die_in_turn_and_one_job_runs_to_its_end(stack, silent, digits):
    flow_run = run_deployment(stack, digits, "steps=1500", "checkpoint.every_steps=1500")
    run = training_run(stack, flow_run)
    die_in_turn(stack, flow_run, run)
    shown = request(stack, "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}})
    health = [each for each in shown if each["key"].startswith("health-")]
    made = {each["type"]: each for each in shown if each not in health}
    assert len(shown) == len(health) + len(made) == 4, "one of each, whoever watched"
    assert json.loads(made["table"]["data"])[0]["steps"] == 1500
    assert made["progress"]["data"] == 100.0 and "step 1500/1500" in made["progress"]["description"]
    assert f"{stack['mlflow_url']}/#/experiments/" in made["markdown"]["data"]


@pytest.mark.slurm
def test_they_die_in_turn_over_a_job_on_two_nodes_of_a_cluster(stack, slurm, digits):
    os.kill(worker_of(stack), signal.SIGKILL)
    restarted_worker(stack)  # with the cluster in its environment
    settings = [each for each in ON_TWO_NODES if not each.startswith(("steps=", "checkpoint.", "data."))]
    flow_run = run_deployment(stack, digits, *settings, "steps=300", "checkpoint.every_steps=300", profile="slurm")
    run = training_run(stack, flow_run)
    job = read_json(run.job_file)
    die_in_turn(stack, flow_run, run)
    assert read_json(run.job_file)["id"] == job["id"]


def test_a_flow_that_cannot_stop_its_job_is_replaced_by_the_hook(stack, digits):
    flow_run = run_deployment(stack, digits, *LONG, "seed=3")
    run = training_run(stack, flow_run)
    supervisor, ranks = ranks_of(run)
    psutil.Process(watcher_pid(stack, flow_run)).suspend()
    request(stack, f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait(lambda: not works(supervisor), "the hook did not stop the job")
    assert run.newest_checkpoint() is not None and not any(map(works, ranks))
    wait(lambda: state(stack, flow_run)[0] == "CANCELLED", "the flow run was not cancelled")
    wait(lambda: not note(stack, flow_run).path.exists(), "the hook left a note")


def test_a_cancelled_flow_run_stops_its_job_with_a_checkpoint_without_worker_and_after_an_outage(stack, digits):
    home = Path(stack["home"])
    flow_run = run_deployment(stack, digits, *LONG, "seed=2")
    run = training_run(stack, flow_run)
    supervisor, ranks = ranks_of(run)
    os.kill(worker_of(stack), signal.SIGKILL)
    kill(server_of(stack))
    restarted_server(stack, home)
    request(stack, f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait(lambda: state(stack, flow_run)[0] == "CANCELLED", "the flow run was not cancelled")
    assert "stopped on request" in state(stack, flow_run)[1]
    assert run.newest_checkpoint() is not None
    assert not any(map(works, [supervisor, *ranks]))


def test_runs_wait_for_a_slot_of_the_limit_of_their_place_and_for_none_where_there_is_no_limit(stack, tmp_path):
    (tmp_path / "profile.yaml").write_text("kind: local\n")
    environment = os.environ | {"PREFECT_API_URL": stack["prefect_api_url"], "PREFECT_LOGGING_LEVEL": "ERROR"}

    def said():
        command = [sys.executable, "-c", SLOTS, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert said() == ["first in", "second cancelled", "third in"]
    post(f"{stack['prefect_api_url']}/v2/concurrency_limits/", {"name": "vit-local", "limit": 1})
    waited = "waiting for a free slot of the limit `vit-local`"
    assert said() == ["first in", waited, "second cancelled", "third in"]
    http = urllib.request.Request(f"{stack['prefect_api_url']}/v2/concurrency_limits/vit-local", method="DELETE")
    urllib.request.urlopen(http, timeout=30).close()


def test_a_flow_run_that_fell_silent_is_crashed_by_the_one_automation(stack, silent):
    made = post(f"{stack['prefect_api_url']}/automations/filter", {})
    assert [each["name"] for each in made] == ["vit: flow runs that fell silent"]
    command = [sys.executable, "-m", "flows.services.deployments", "local", "", ""]
    environment = local_prefect_environment(Path(stack["home"]), stack["prefect_api_url"])
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, timeout=120)
    assert post(f"{stack['prefect_api_url']}/automations/filter", {}) == made
    wait(lambda: state(stack, silent)[0] == "CRASHED", "the automation did nothing", seconds=240)
    assert "not heard of for 90 s" in state(stack, silent)[1]
