"""The launcher against an API server: submitted once, found again, read in words, stopped, and no answer is no end."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.job import CancelError, Job, JobRequest, JobState, SubmitError, read_object
from cluster.kubernetes import launcher as module
from cluster.kubernetes.launcher import KubernetesLauncher
from cluster.kubernetes.profile import KubernetesProfile
from cluster.resubmit import resubmit
from tests.cluster.kubernetes import Cluster

PENDING, RUNNING, ENDED, UNKNOWN = JobState.PENDING, JobState.RUNNING, JobState.ENDED, JobState.UNKNOWN
NAME = "vit-mae-0a1b2c3d"


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[Cluster]:
    cluster = Cluster().start()
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    yield cluster
    cluster.stop()


@pytest.fixture
def request_(tmp_path) -> JobRequest:
    directory = tmp_path / "run"
    directory.mkdir()
    directory.chmod(0o777)
    command = ("/opt/bin/python", "-m", "pipeline.launch", str(directory))
    return JobRequest("mae-0a1b2c3d", directory, command, {}, 0, directory / "unused")


def launcher_in(request: JobRequest, **fields) -> KubernetesLauncher:
    given = {
        "kind": "kubernetes",
        "image": "vit:1",
        "nodes": 2,
        "volumes": [{"claim": "c", "path": str(request.directory.parent)}],
    }
    return KubernetesLauncher(KubernetesProfile.model_validate(given | fields))


def test_a_job_is_submitted_once_and_owns_its_service(cluster, request_):
    launcher = launcher_in(request_)
    assert launcher.find(request_.directory) is None
    job = launcher.submit(request_)
    assert (job.kind, job.id, job.key, job.attempt) == ("kubernetes", f"{NAME}:1", request_.key, 0)
    service = cluster.objects["services", NAME]
    assert service["metadata"]["ownerReferences"][0]["uid"] == cluster.job()["metadata"]["uid"]
    assert launcher_in(request_).submit(request_) == job  # again, from another process
    assert len(cluster.objects) == 2
    assert launcher.find(request_.directory) == job and launcher.state(job) is PENDING
    assert f"name: {NAME}" in (request_.directory / "submit" / "job.yaml").read_text()


def test_what_lost_its_answer_or_its_submitter_is_found_again(cluster, request_):
    cluster.drops = lambda method, path: (
        method == "POST" and path.endswith("/jobs") and ("jobs", NAME) in cluster.objects
    )
    job = launcher_in(request_).submit(request_)
    assert job.id == f"{NAME}:1" and cluster.job() and ("services", NAME) in cluster.objects
    cluster.drops = lambda method, path: False
    del cluster.objects["services", NAME]  # the submitter died before it had made the Service
    (request_.directory / "job.json").unlink()
    assert launcher_in(request_).find(request_.directory) == job
    assert launcher_in(request_).submit(request_) == job and ("services", NAME) in cluster.objects
    for path in (request_.directory / "submit").iterdir():  # applied by hand: nothing was submitted from here
        path.unlink()
    (request_.directory / "job.json").unlink()
    assert launcher_in(request_).find(request_.directory) == job


def test_somebody_who_was_quicker_is_joined(cluster, request_):
    mine = launcher_in(request_)
    documents = mine._manifests(request_, 7)
    cluster.refuses = lambda method, path: None

    def quicker(method: str, path: str) -> tuple | None:
        if method == "POST" and path.endswith("/services"):  # the dry run of the second document: all is checked by now
            cluster.answer("POST", "/apis/batch/v1/namespaces/vit/jobs", {}, documents[-1])
            cluster.refuses = lambda method, path: None
        return None

    cluster.refuses = quicker
    assert mine.submit(request_).id == f"{NAME}:7"
    assert read_object(request_.directory / "job.json")["id"] == f"{NAME}:7"


def test_a_job_that_has_ended_makes_room_and_the_next_is_another(cluster, request_):
    launcher = launcher_in(request_)
    job = launcher.submit(request_)
    pod = cluster.make_pod(0)
    cluster.logs[pod["metadata"]["name"]] = "what it said\n"
    assert launcher.state(job) is RUNNING
    cluster.end_pod(pod, 76)
    cluster.end_job("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    assert launcher.state(job) is ENDED
    threading.Timer(0.3, cluster.pods_are_gone).start()
    second = launcher.submit(request_)
    assert second.id == f"{NAME}:2" and launcher.state(second) is PENDING and launcher.state(job) is ENDED
    assert ("services", NAME) in cluster.objects and len(cluster.objects) == 2
    assert launcher.log(job, 0)[0] == f"[{pod['metadata']['name']}] what it said\n"  # it outlives the pod


def test_a_controller_submits_again_what_used_up_its_restarts_if_it_moves_and_without_the_machine(cluster, request_):
    launcher = launcher_in(request_, max_restarts=1)
    launcher.submit(request_)
    cluster.end_job("Failed", "BackoffLimitExceeded")

    def attempt(number: int, step: int) -> None:
        folder = request_.directory / f"attempts/{number:02d}/exit"
        folder.mkdir(parents=True)
        (folder / "verdict.json").write_text(json.dumps({"code": 76, "step": step, "node": "gpu-7"}))
        for path in request_.directory.rglob("*"):
            path.chmod(0o777)

    attempt(1, 100)
    assert resubmit(request_.directory, 76, launcher) == f"submitted again as job {NAME}:2, without gpu-7"
    assert "gpu-7" in json.dumps(cluster.job()["spec"]["template"]["spec"]["affinity"])
    cluster.end_job("Failed", "BackoffLimitExceeded")
    attempt(2, 100), attempt(3, 100)
    assert resubmit(request_.directory, 76, launcher).startswith("not submitted again: 2 attempts in a row made no new")
    assert resubmit(request_.directory, 1, launcher) == "not submitted again: exit code 1 does not ask for it"


def test_a_state_is_told_with_the_clusters_own_reason(cluster, request_):
    launcher = launcher_in(request_)
    job = launcher.submit(request_)
    told = lambda: launcher.explain(job).removeprefix(f"Kubernetes job {NAME}: ")  # noqa: E731
    assert told() == "PENDING (no pod yet)"
    cluster.job()["spec"]["suspend"] = True
    assert told() == "PENDING (suspended)"
    cluster.job()["spec"]["suspend"] = False
    no_room = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/4:\n4 Insufficient gpu",
    }
    waits = cluster.make_pod(0, "Pending", conditions=[no_room])
    assert launcher.state(job) is PENDING and told() == "PENDING (Unschedulable: 0/4: 4 Insufficient gpu)"
    pulls = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    waits["status"] = {"phase": "Pending", "containerStatuses": [{"state": pulls}]}
    assert told() == "PENDING (ImagePullBackOff: no such image)"
    runs = cluster.make_pod(1)
    assert launcher.state(job) is RUNNING
    assert told() == "RUNNING on gpu-1; 1 pods wait (ImagePullBackOff: no such image)"
    cluster.end_pod(runs, 2, "first line\n/vit/run: not a run directory")
    cluster.end_job("Failed", "PodFailurePolicy", "exit code 2 matching FailJob rule")
    assert launcher.state(job) is ENDED
    assert told() == (
        "FAILED (PodFailurePolicy: exit code 2 matching FailJob rule), "
        f"pod {runs['metadata']['name']} exit code 2: /vit/run: not a run directory"
    )
    cluster.job()["status"] = {}
    cluster.end_pod(runs, 137, reason="OOMKilled")
    cluster.objects.pop(("pods", waits["metadata"]["name"]))
    assert told() == f"PENDING (after pod {runs['metadata']['name']} exit code 137 (OOMKilled))"
    cluster.end_job("Complete")
    assert launcher.state(job) is ENDED and told() == "COMPLETE"
    cluster.objects.clear()
    assert launcher.state(job) is ENDED and told() == "CANCELLED (the job is gone)"


def test_a_server_that_is_away_is_unknown_and_never_an_end(cluster, request_):
    launcher = launcher_in(request_)
    job = launcher.submit(request_)
    cluster.make_pod(0)
    cluster.stop()
    assert launcher.state(job) is UNKNOWN and "does not answer" in launcher.explain(job)
    assert launcher.find(request_.directory) == job and launcher.log(job, 0) == ("", 0)
    with pytest.raises(SubmitError, match="nothing was submitted: http://127.0.0.1:[0-9]+ does not answer"):
        launcher.submit(request_)
    cluster.start()
    assert launcher.state(job) is RUNNING
    for code in (500, 503, 429):
        cluster.refuses = lambda method, path, code=code: (code, "etcd leader changed", "InternalError")
        assert launcher.state(job) is UNKNOWN and f"answered {code}: etcd leader changed" in launcher.explain(job)


def test_who_may_not_or_is_not_known_is_told_so_in_a_line(cluster, request_, tmp_path, monkeypatch):
    words = 'jobs.batch is forbidden: User "eve" cannot create resource "jobs"'
    cluster.refuses = lambda method, path: (403, words, "Forbidden") if method == "POST" else None
    with pytest.raises(SubmitError) as said:
        launcher_in(request_).submit(request_)
    assert words in str(said.value) and "cluster/manifests/rights.yaml" in str(said.value)
    assert "\n" not in str(said.value) and not (request_.directory / "job.json").exists()
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "other", token="old")))
    with pytest.raises(SubmitError, match=r"does not know you \(401\): log in again, or choose profile.context"):
        launcher_in(request_).submit(request_)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(SubmitError, match="nothing was submitted: there is no kubeconfig"):
        launcher_in(request_).submit(request_)
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "other")))
    with pytest.raises(SubmitError, match="elsewhere"):
        launcher_in(request_, context="elsewhere").submit(request_)


def test_without_the_package_the_command_that_installs_it_is_named(cluster, request_, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kubernetes", None)
    with pytest.raises(SubmitError, match="install it: uv sync --extra kubernetes"):
        launcher_in(request_).submit(request_)
    assert launcher_in(request_).objections(request_) == ([], [])  # whoever only looks needs none


def test_a_stop_deletes_the_job_and_waits_for_its_pods(cluster, request_):
    launcher = launcher_in(request_)
    job = launcher.submit(request_)
    cluster.make_pod(0), cluster.make_pod(1)
    stopping = threading.Thread(target=launcher.cancel, args=(job, 60.0))
    stopping.start()
    deadline = time.monotonic() + 10
    while not cluster.job()["metadata"].get("deletionTimestamp"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert launcher.state(job) is RUNNING and launcher.explain(job).endswith("STOPPING") and stopping.is_alive()
    assert read_object(request_.directory / "stop.json")["by"]
    cluster.pods_are_gone()
    stopping.join(10)
    assert not stopping.is_alive() and not cluster.objects and launcher.state(job) is ENDED
    assert resubmit(request_.directory, 75, launcher).startswith("not submitted again: the run was asked to stop by")
    assert [method for method, path in cluster.asked if path.endswith(NAME)].count("DELETE") == 1


def test_pods_that_do_not_go_are_ended_by_force_and_what_is_not_confirmed_is_said(cluster, request_, monkeypatch):
    monkeypatch.setattr(module, "FORCE_SECONDS", 0.5)
    launcher = launcher_in(request_)
    job = launcher.submit(request_)
    cluster.make_pod(0)
    with pytest.raises(
        CancelError, match=f"{NAME} may not have stopped: STOPPING; look at: kubectl -n vit get pods -l"
    ):
        launcher.cancel(job, 0.2)  # the kubelet is gone: even by force the Job stays
    assert not cluster.pods()
    cluster.stop()
    with pytest.raises(CancelError, match="does not answer"):
        launcher.cancel(job, 0.0)
    cluster.start()
    cluster.refuses = lambda method, path: (403, "no", "Forbidden") if method == "DELETE" else None
    cluster.job()["metadata"].pop("deletionTimestamp")
    with pytest.raises(CancelError, match="Kubernetes: no; ask for that right"):
        launcher.cancel(job, 5.0)
    assert not (request_.directory / "stop.json").exists()


def test_logs_of_pods_are_read_by_offset_in_whole_lines_and_each_once(cluster, request_):
    launcher = launcher_in(request_)
    job = launcher.submit(request_)
    first = cluster.make_pod(0, uid="aaaaa")
    cluster.logs[first["metadata"]["name"]] = "one\ntw"
    said, offset = launcher.log(job, 0)
    assert said == f"[{NAME}-0-aaaaa] one\n"
    cluster.logs[first["metadata"]["name"]] = "one\ntwo\nthree"
    second = cluster.make_pod(1, uid="bbbbb")
    cluster.logs[second["metadata"]["name"]] = "other\n"
    said, offset = launcher.log(job, offset)
    assert said == f"[{NAME}-0-aaaaa] two\n[{NAME}-1-bbbbb] other\n"
    cluster.end_pod(first, 1)
    assert launcher.log(job, offset)[0] == f"[{NAME}-0-aaaaa] three\n"


def test_a_run_that_pods_would_not_see_or_could_not_write_is_refused_beforehand(cluster, request_, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    launcher = launcher_in(request_, volumes=[{"claim": "c", "path": "/vit"}])
    wrong, elsewhere = launcher.objections(request_)
    assert not wrong and elsewhere[0].startswith(
        f"{request_.directory}: the run directory lies on no volume of the pod"
    )
    asked = len(cluster.asked)
    with pytest.raises(SubmitError, match="lies on no volume of the pods"):
        launcher.submit(request_)
    assert {method for method, _ in cluster.asked[asked:]} == {"GET"} and not cluster.objects
    request_.directory.chmod(0o755)
    stranger = {"user": os.getuid() + 4321, "group": 4321}
    with pytest.raises(SubmitError, match="the pods run as .* and cannot write it .*; chown or chmod it, or set"):
        launcher_in(request_, **stranger).submit(request_)
    elsewhere = JobRequest(**vars(request_) | {"reads": ("/data/birds",)})
    with pytest.raises(SubmitError, match="/data/birds: this dataset lies on no volume"):
        launcher_in(request_).submit(elsewhere)
    read_only = [{"claim": "c", "path": str(request_.directory.parent), "read_only": True}]
    with pytest.raises(SubmitError, match="which the profile mounts read_only; take that out"):
        launcher_in(request_, volumes=read_only).submit(request_)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_prepared_is_given_to_the_user_of_the_pods(cluster, request_):
    request_.directory.chmod(0o755)
    (request_.directory / "config.yaml").touch()
    launcher_in(request_, user=4321, group=4322).submit(request_)
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in request_.directory.glob("*.yaml")}
    assert owners == {(4321, 4322)}


def test_a_name_that_another_run_has_is_not_taken_from_it(cluster, request_):
    job = launcher_in(request_).submit(request_)
    cluster.job()["metadata"]["annotations"]["vit/directory"] = "/vit/another"
    with pytest.raises(SubmitError, match=f"the job {NAME} is there and of another run, /vit/another"):
        launcher_in(request_).submit(request_)
    assert launcher_in(request_).find(request_.directory) == job  # the recorded one


def test_what_the_server_refuses_in_a_dry_run_is_said_and_leaves_nothing(cluster, request_):
    words = 'Job in version "v1" cannot be handled as a Job: strict decoding error: unknown field "spec.paralelism"'
    cluster.refuses = lambda method, path: (400, words, "BadRequest") if path.endswith("/jobs") else None
    assert launcher_in(request_).objections(request_)[0] == [f"Job/{NAME}: Kubernetes: {words}"]
    cluster.refuses = lambda method, path: None
    assert launcher_in(request_).objections(request_) == ([], []) and not cluster.objects
    assert ("POST", "/apis/batch/v1/namespaces/vit/jobs") in cluster.asked


def test_a_jobset_is_submitted_and_read_the_same_way(cluster, request_):
    launcher = launcher_in(request_, backend="jobset")
    job = launcher.submit(request_)
    assert job.id == f"{NAME}:1" and launcher.state(job) is PENDING and len(cluster.objects) == 1
    cluster.end_job("Completed", "AllJobsCompleted", plural="jobsets")
    assert launcher.state(job) is ENDED and launcher.explain(job).endswith("COMPLETED")


def test_many_runs_are_a_job_each(cluster, request_, tmp_path):
    other = tmp_path / "other"
    other.mkdir(mode=0o777)
    other.chmod(0o777)
    command = (*request_.command[:-1], str(other))
    jobs = launcher_in(request_).submit_array([request_, JobRequest("b-2", other, command, {}, 0, other)])
    assert [job.id for job in jobs] == [f"{NAME}:1", "vit-b-2:1"]


def test_a_job_of_before_is_told_from_the_one_that_has_its_name(cluster, request_):
    launcher = launcher_in(request_)
    launcher.submit(request_)
    assert launcher.state(Job("kubernetes", f"{NAME}:9", request_.key, 0, request_.directory)) is ENDED


def test_a_run_that_came_from_another_cluster_counts_on_above_its_jobs(cluster, request_):
    before = {"kind": "slurm", "id": "4711", "key": request_.key, "attempt": 3, "start": "4711.0"}
    (request_.directory / "job.json").write_text(json.dumps(before))
    assert launcher_in(request_).submit(request_).id == f"{NAME}:4712"
    said = read_object(Path(request_.directory) / "job.json")
    assert said["attempt"] == 3 and "start" not in said


def test_a_dry_run_says_whether_a_server_was_asked(cluster, request_, capsys):
    assert launcher_in(request_).objections(request_) == ([], [])
    assert capsys.readouterr().err == f"job.yaml: checked by http://127.0.0.1:{cluster._port}\n"
    cluster.stop()
    assert launcher_in(request_).objections(request_) == ([], [])
    assert capsys.readouterr().err.startswith("job.yaml: not checked by a server: http://127.0.0.1:")
