"""A run on Kubernetes as the command line and the controller see it: an API server stands in for the cluster."""

import json
import threading
import time
from collections.abc import Iterator

import pytest

from cluster.kubernetes import launcher as module
from flows.command_line.commands import training_command
from flows.command_line.runs import carried_out, logs_command, runs_command, stop_command
from flows.control import following
from flows.control.following import Follower
from flows.control.submission import launcher_of, request_of, shared_memory_bytes
from flows.requests.training import training_run
from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_INPUT, EXIT_STOPPED, InputError
from pipeline.run_directory import RunDirectory, read_json, write_json
from tests.cluster.kubernetes import Cluster

FIGURES = {
    "perf/images_per_second": 5.0, "perf/loader_images_per_second": 9.0, "perf/data_wait_share": 0.0,
    "perf/seconds_left": 7.0, "train/loss": 2.0,
}  # fmt: skip


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[Cluster]:
    cluster = Cluster().start()
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "kubeconfig")))
    for name in ("LOOK_SECONDS", "STATE_SECONDS", "CONFIRM_SECONDS", "OBSERVE_SECONDS", "CLUSTER_LINE_SECONDS"):
        monkeypatch.setattr(following, name, 0.02)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    yield cluster
    cluster.stop()


@pytest.fixture
def run(digits, home, tmp_path) -> RunDirectory:
    """A prepared run of two pods, on a volume that holds everything here."""
    settings = ["profile.nodes=2", "profile.volumes=[{claim: all, path: /tmp}]", "profile.max_restarts=1"]
    folder = home / "runs" / "mae"
    if not all(str(path).startswith("/tmp/") for path in (digits, folder)):
        pytest.skip("the test's folders do not lie in /tmp")
    return training_run(
        "pretrain", "pretrain_mae_debug", data=str(digits), profile="kubernetes", run_dir=str(folder), home=home,
        overrides=[*settings, "steps=3", "global_batch_size=128"],
    )  # fmt: skip


def begins(run: RunDirectory, attempt: int) -> None:
    """As the first pod does."""
    job = read_json(run.job_file)
    write_json(run.job_file, job | {"attempt": attempt, "start": f"{job['id'].partition(':')[2]}.{attempt}"})
    run.attempt(attempt).make().ledger.write_text(json.dumps({"step": 3 * attempt} | FIGURES) + "\n")


def ends(run: RunDirectory, attempt: int, code: int, reason: str, step: int = -1) -> None:
    content = {"code": code, "reason": reason, "step": step, "node": None}
    write_json(run.attempt(attempt).path / "exit" / "verdict.json", content)


def until(true, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_is_submitted_listed_shown_and_stopped_by_the_same_commands(cluster, run, home):
    said: list[str] = []
    say = lambda line, error=False: said.append(line)  # noqa: E731
    assert carried_out(run, home, say) == EXIT_DONE and carried_out(run, home, say) == EXIT_DONE
    name = cluster.job()["metadata"]["name"]
    submitted = [line for line in said if "submitted: " in line]
    assert submitted == [
        f"{word}: Kubernetes job {name}: PENDING (no pod yet)" for word in ("submitted", "already submitted")
    ]
    pod = cluster.make_pod(0)
    cluster.logs[pod["metadata"]["name"]] = "attempt 1: 1 of 2 pods are here, waiting\n"
    begins(run, 1)
    runs_command(str(home), say)
    assert f"Kubernetes job {name}: RUNNING on gpu-0" in said[-1] and " running " in said[-1]
    logs_command(str(run.path), str(home), say)
    assert "1 of 2 pods are here, waiting" in said[-1] or "1 of 2 pods are here, waiting" in said[-2]

    def stops() -> None:
        until(lambda: cluster.job()["metadata"].get("deletionTimestamp"))
        ends(run, 1, EXIT_STOPPED, "stopped on request at step 3 of 3, checkpoint complete")
        cluster.pods_are_gone()

    stopping = threading.Thread(target=stops)
    stopping.start()
    assert stop_command(str(run.path), str(home), say) == EXIT_DONE
    stopping.join()
    assert "stopped on request at step 3 of 3, checkpoint complete" in said[-2] and not cluster.objects
    runs_command(str(home), say)
    assert " stopped " in said[-1]


def test_a_controller_follows_through_restarts_silence_and_a_job_that_used_them_up(cluster, run):
    said: list[str] = []
    end: list[tuple[int, str]] = []
    follower = Follower(run, launcher_of(run), said.append, cancelled=threading.Event(), detached=threading.Event())
    watching = threading.Thread(target=lambda: end.append(follower.follow()))
    watching.start()
    until(lambda: ("jobs") in [plural for plural, _ in cluster.objects])
    cluster.make_pod(0)
    begins(run, 1)
    until(lambda: any("attempt 1 runs as kubernetes job" in line for line in said))
    cluster.stop()
    until(lambda: any("kubernetes does not answer" in line for line in said))
    cluster.start()
    ends(run, 1, EXIT_FAULT, "pod 1 was started again", step=2)  # the Job makes the pods again
    begins(run, 2)
    until(lambda: any("attempt 2 runs as" in line for line in said))
    assert watching.is_alive() and not end
    ends(run, 2, EXIT_FAULT, "node 1 was lost", step=4)
    cluster.end_job("Failed", "BackoffLimitExceeded")
    cluster.pods_are_gone()
    until(lambda: read_json(run.job_file)["id"].endswith(":2"))
    until(lambda: "jobs" in [plural for plural, _ in cluster.objects])  # the old one is deleted first
    until(lambda: cluster.job()["metadata"]["labels"]["vit/generation"] == "2")
    cluster.make_pod(0)
    begins(run, 3)
    until(lambda: any("attempt 3 runs as" in line for line in said))
    ends(run, 3, EXIT_DONE, "done")
    cluster.end_job("Complete")
    watching.join(20)
    assert end == [(EXIT_DONE, "done")]
    assert any(line.startswith("node 1 was lost (Kubernetes job ") and line.endswith("; going on") for line in said)


def test_a_job_that_somebody_deleted_is_not_made_again(cluster, run):
    launcher = launcher_of(run)
    launcher.submit(request_of(run))
    begins(run, 1)
    ends(run, 1, EXIT_STOPPED, "stopped on request at step 3 of 3, checkpoint complete", step=3)
    follower = Follower(run, launcher, lambda line: None, cancelled=threading.Event(), detached=threading.Event())
    job = launcher.find(run.path)
    cluster.objects.clear()
    assert follower._successor(job, EXIT_STOPPED, 1) is None and not cluster.objects


def test_a_dry_run_writes_the_manifest_asks_the_server_and_submits_nothing(cluster, digits, home):
    said: list[str] = []
    errors: list[str] = []

    def say(line: str, error: bool = False) -> None:
        (errors if error else said).append(line)

    def dry(*settings: str) -> int:
        return training_command(
            "pretrain", "pretrain_mae_debug", data=[str(digits)], profile="kubernetes", overrides=[
                "profile.nodes=2", "steps=3", "global_batch_size=128", *settings], dry_run=True, rehearse=None,
            run_dir=str(home / "dry"), directory=str(home), model=None, watch=False, say=say,
        )  # fmt: skip

    assert dry() == EXIT_DONE and not cluster.objects
    assert any("completionMode: Indexed" in line for line in said) and not (home / "dry" / "job.json").exists()
    assert ("POST", "/apis/batch/v1/namespaces/vit/jobs") in cluster.asked
    assert errors[0].startswith(
        f"would not be submitted from here: {home / 'dry'}: the run directory lies on no volume"
    )
    cluster.refuses = lambda method, path: (422, "spec.template: wrong", "Invalid") if path.endswith("/jobs") else None
    assert dry() == EXIT_INPUT and any("Kubernetes: spec.template: wrong" in line for line in errors)
    cluster.refuses = lambda method, path: None
    with pytest.raises(InputError, match="HF_TOKEN: a secret would stand"):
        dry("profile.env={HF_TOKEN: x}")


def test_shared_memory_follows_from_ranks_micro_batch_and_workers(run):
    plan = run.plan()
    one = 4 * 3 * 32 * 32 * plan["batches"]["micro_batch_size"]
    assert plan["ranks_per_node"] == 8 and shared_memory_bytes(run) == 8 * (
        (32 << 20) + one * (1 + plan["loader_workers"])
    )
    assert request_of(run).reads == (str(read_json(run.plan_file)["data"]["path"]),)


def test_a_submission_that_is_refused_is_one_line(cluster, run):
    cluster.refuses = lambda method, path: (403, "no", "Forbidden") if method == "POST" else None
    with pytest.raises(InputError, match="not submitted: .*ask for that right"):
        carried_out(run, run.path.parents[1], lambda line, error=False: None)
