"""The manifests: golden files, the API's own schemas of two versions, what the lint and a profile refuse."""

import copy
import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from cluster.job import JobRequest
from cluster.kubernetes.launcher import KubernetesLauncher
from cluster.kubernetes.lint import MOST_NAME, Needs, problems
from cluster.kubernetes.manifest import job_name, manifest_text, manifests
from cluster.kubernetes.profile import KubernetesProfile, bytes_of
from cluster.launchers import launcher_for
from cluster.profile import Profile, nodes_range, resolved_profile

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "kubernetes"
VERSIONS = ("1.27", "1.36")  # the oldest that is supported, and the newest that was asked
RUN = Path("/vit/runs/mae")
VOLUMES = [{"claim": "vit", "path": "/vit"}]
EVERYTHING: dict[str, Any] = {
    "nodes": "2-4", "gather_minutes": 5, "accelerators_per_node": 4, "accelerator_resource": "amd.com/gpu", "cpus": 64,
    "memory": "480Gi", "shared_memory": "32Gi", "namespace": "vision", "image": "r.example/vit@sha256:" + 64 * "1",
    "python": "/opt/vit/bin/python", "image_pull_policy": "Always", "image_pull_secrets": ["registry"],
    "volumes": [*VOLUMES, {"claim": "images", "path": "/data", "subpath": "birds", "read_only": True},
                {"claim": "vit", "path": "/vit2", "subpath": "more"}],
    "user": 2000, "group": 3000, "service_account": "vit-run", "node_selector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"},
                    {"key": "team", "operator": "Equal", "value": "vision"}],
    "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]}}},
    "priority_class": "high", "runtime_class": "nvidia", "queue": "research",
    "rdma": {"resource": "rdma/ib", "count": 8},
    "host_network": True, "labels": {"team": "vision"}, "annotations": {"note": "it's \"mine\""},
    "env": {"NCCL_SOCKET_IFNAME": "ib0"},
    "env_from_secret": {"AWS_SECRET_ACCESS_KEY": {"secret": "s3", "key": "secret"}},
    "grace_seconds": 600, "max_restarts": 5, "keep_finished_hours": None,
}  # fmt: skip
CASES = {
    "two_nodes": {"nodes": 2},
    "everything": EVERYTHING,
    "jobset": {"nodes": 2, "backend": "jobset", "queue": "research"},
    "processors": {"accelerators_per_node": 0, "cpus": 4},
}


def profile_with(**fields) -> KubernetesProfile:
    return KubernetesProfile.model_validate({"kind": "kubernetes", "image": "vit:1", "volumes": VOLUMES} | fields)


def request_in(directory: Path = RUN, key: str = "mae-0a1b2c3d", **fields) -> JobRequest:
    command = ("/home/me/.venv/bin/python3.11", "-m", "pipeline.launch", str(directory))
    given = {"stop_lead_seconds": 180.2, "shared_memory_bytes": 3 << 30} | fields
    return JobRequest(key, directory, command, {"A": "b"}, 3, directory / "unused", **given)


def rendered(case: str, **fields) -> list[dict]:
    avoided = ["gpu-7", "gpu-9"] if case == "everything" else []
    return manifests(request_in(), profile_with(**CASES[case] | fields), 7, (1005, 1006), avoided)


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_their_golden_file(case):
    """Look at the difference, then accept it with VIT_ACCEPT_GOLDEN=1."""
    path, text = GOLDEN / f"{case}.yaml", manifest_text(rendered(case))
    if os.environ.get("VIT_ACCEPT_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_the_schemas_of_two_versions_and_our_own_lint_find_nothing(case, version):
    documents = list(yaml.safe_load_all(manifest_text(rendered(case))))
    for document in documents:
        if document["kind"] != "JobSet":
            kubernetes_validate.validate(document, version, strict=True)
        else:  # a resource of its own, whose job's template is Kubernetes'
            (job,) = document["spec"]["replicatedJobs"]
            inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": document["metadata"]}
            kubernetes_validate.validate(inner | {"spec": job["template"]["spec"]}, version, strict=True)
    assert problems(documents, Needs(180.2, 3 << 30)) == []


def _broken(change, case: str = "two_nodes") -> list[str]:
    documents = copy.deepcopy(rendered(case))
    change(documents)
    return problems(documents, Needs(180.2, 3 << 30))


def _job(documents: list[dict]) -> dict:
    return documents[-1]["spec"]


def _pod(documents: list[dict]) -> dict:
    return _job(documents)["template"]["spec"]


def _container(documents: list[dict]) -> dict:
    return _pod(documents)["containers"][0]


def _limits(documents: list[dict], value: Any, kinds: tuple[str, ...] = ("limits", "requests")) -> None:
    for kind in kinds:
        _container(documents)["resources"][kind]["nvidia.com/gpu"] = value


def _memory(documents: list[dict]) -> None:
    _container(documents)["resources"]["limits"]["memory"] = "16GB"


def _rules(documents: list[dict]) -> list[dict]:
    return _job(documents)["podFailurePolicy"]["rules"]


def _variable(documents: list[dict], name: str) -> dict:
    return next(one for one in _container(documents)["env"] if one["name"] == name)


BROKEN = {
    "an unknown field": (
        lambda d: _job(d).update(paralelism=2),
        "spec.paralelism: unknown field; did you mean parallel",
    ),
    "a wrong type": (lambda d: _job(d).update(parallelism="two"), "spec.parallelism: 'two': must be a whole number"),
    "a wrong structure": (lambda d: _pod(d).update(containers={"name": "x"}), "a field has the wrong type"),
    "restartPolicy Always": (lambda d: _pod(d).update(restartPolicy="Always"), "restartPolicy: Always: the Job makes"),
    "a failure policy beside OnFailure": (lambda d: _pod(d).update(restartPolicy="OnFailure"),
                                          "podFailurePolicy: is allowed with restartPolicy Never alone"),
    "requests that are not limits": (lambda d: _limits(d, "4", ("requests",)), "requests 4 and limits 8: devices are"),
    "a divided GPU": (lambda d: _limits(d, "500m"), "500m: a device is not divided; write a whole number"),
    "a number as quantity": (lambda d: _limits(d, 8), 'nvidia.com/gpu: 8: quantities are text; write "8"'),
    "16GB": (_memory, "limits.memory: 16GB: not a quantity; write it as 16Gi, 500m or 8"),
    "an Indexed Job without completions": (
        lambda d: _job(d).pop("completions"),
        "spec.completions: missing: an Indexed",
    ),
    "completions that are not parallelism": (lambda d: _job(d).update(parallelism=1),
                                             "completions: 2, parallelism 1: all ranks run at once"),
    "a wrong word": (
        lambda d: _job(d).update(completionMode="indexed"),
        "completionMode: indexed: ranks need an index",
    ),
    "a wrong pull policy": (
        lambda d: _container(d).update(imagePullPolicy="always"),
        "imagePullPolicy: always: unknown",
    ),
    "a bad name": (
        lambda d: d[-1]["metadata"].update(name="ViT_L"),
        "metadata.name: ViT_L: must be lower-case letters",
    ),
    "a name without room": (
        lambda d: d[-1]["metadata"].update(name="v" * 53),
        "has 53 letters, and -NN-xxxxx must fit",
    ),
    "a mount without its volume": (
        lambda d: _pod(d)["volumes"].pop(),
        "volumeMounts: claim-0: no volume has that name",
    ),
    "no image": (lambda d: _container(d).pop("image"), "containers[0].image: missing: there is nothing to run"),
    "batch/v2": (lambda d: d[-1].update(apiVersion="batch/v2"), "apiVersion: batch/v2: Job is of batch/v1; write that"),
    "a subdomain without Service": (
        lambda d: d.pop(0),
        "subdomain: vit-mae-0a1b2c3d: there is no Service of that name",
    ),
    "no subdomain": (lambda d: _pod(d).pop("subdomain"), "subdomain: missing: pods would have no names"),
    "a selector that finds no pod": (
        lambda d: d[0]["spec"].update(selector={"a": "b"}),
        "selects other pods; make them",
    ),
    "a Service with an address": (
        lambda d: d[0]["spec"].pop("clusterIP"),
        "spec.clusterIP: None: pods have names only",
    ),
    "another first pod": (
        lambda d: _container(d)["env"][4].update(value="vit-0"),
        "MASTER_ADDR vit-0: the first pod is",
    ),
    "code 2 that is tried again": (
        lambda d: _job(d)["podFailurePolicy"]["rules"].pop(1),
        "exit code 2 has no rule; give",
    ),
    "code 0 as a failure": (lambda d: _job(d)["podFailurePolicy"]["rules"][1]["onExitCodes"].update(values=[0, 1, 2]),
                            "onExitCodes.values: 0 is no failure"),
    "a limit that one incident may pass": (lambda d: _job(d).update(backoffLimit=3), "backoffLimit: 3: each of 2 pods"),
    "a grace shorter than a checkpoint": (lambda d: _pod(d).update(terminationGracePeriodSeconds=30),
                                          "terminationGracePeriodSeconds: 30: a checkpoint may take 180 s"),
    "shared memory on a disk": (
        lambda d: _pod(d)["volumes"][0].update(emptyDir={"sizeLimit": "4Gi"}),
        "lies on a disk",
    ),
    "too little shared memory": (
        lambda d: _pod(d)["volumes"][0]["emptyDir"].update(sizeLimit="1Gi"),
        "may share 3072Mi",
    ),
    "no shared memory": (lambda d: _container(d)["volumeMounts"].pop(0), "/dev/shm is a container's 64 MiB"),
    "a secret in the open": (lambda d: _container(d)["env"].append({"name": "HF_TOKEN", "value": "hf_x"}),
                             "HF_TOKEN: a secret must not stand in a manifest"),
    "a variable twice": (
        lambda d: _container(d)["env"].append({"name": "A", "value": "c"}),
        "A: stands twice; keep one",
    ),
    "root": (lambda d: _pod(d)["securityContext"].update(runAsUser=0), "securityContext: pods run as root"),
    "a toleration with a value too many": (lambda d: _pod(d).update(tolerations=[{"operator": "Exists", "value": "x"}]),
                                           "tolerations[0].value: x: Exists takes no value"),
    "a wrong effect": (lambda d: _pod(d).update(tolerations=[{"key": "a", "effect": "No"}]), "effect: No: unknown"),
    "evictions that count": (lambda d: _rules(d).pop(0), "rules[0]: an evicted pod must not count"),
    "evictions asked last": (lambda d: _rules(d).append(_rules(d).pop(0)), "rules[0]: an evicted pod must not count"),
    "evictions that fail": (lambda d: _rules(d)[0].update(action="FailJob"), "rules[0]: an evicted pod must not count"),
    "all codes but some": (lambda d: _rules(d)[1]["onExitCodes"].update(operator="NotIn"), "operator: NotIn: would"),
    "pods without a name": (lambda d: _variable(d, "VIT_POD").update(name="X"), "VIT_POD: pods would not be told"),
    "another start": (lambda d: _variable(d, "VIT_START").update(value="8"), "VIT_START 8: the label"),
    "more nodes": (lambda d: _variable(d, "VIT_NODES").update(value="3"), "VIT_NODES 3: completions are 2"),
    "a run on no volume": (lambda d: _container(d).update(workingDir="/vitality/a"), "/vitality/a: no volume"),
    "a mount that is relative": (lambda d: _container(d)["volumeMounts"][1].update(mountPath="vit"), "vit: must begin"),
    "a volume of nothing": (lambda d: _pod(d)["volumes"][1].pop("persistentVolumeClaim"), "a name and one source"),
    "two jobs": (lambda d: d.append(copy.deepcopy(d[-1])), "Job: stands 2 times"),
    "a deadline": (lambda d: _job(d).update(activeDeadlineSeconds=9), "activeDeadlineSeconds: 9: would end the run"),
    "pods beside dying ones": (lambda d: _job(d).update(podReplacementPolicy="TerminatingOrFailed"), "have one index"),
    "a queue that is passed": (
        lambda d: d[-1]["metadata"].update(labels={"kueue.x-k8s.io/queue-name": "q"}),
        "spec.suspend: missing: the queue q",
    ),
    "a container as root": (lambda d: _container(d).update(securityContext={"runAsUser": 0}), "runs as root"),
    "more rights": (
        lambda d: _container(d).update(securityContext={"privileged": True}),
        "securityContext.privileged: true: more rights than a run needs",
    ),
    "a token among the words": (
        lambda d: _container(d).update(args=["--token", "hf_abcdefghijkl"]),
        "a secret must not stand in a manifest",
    ),
    "a password in a URL": (
        lambda d: _container(d)["env"].append({"name": "DATABASE", "value": "postgres://u:secret@h/x"}),
        "a secret must not stand in a manifest",
    ),
    "something that starts before": (
        lambda d: _pod(d).update(initContainers=[{"name": "x", "image": "y"}]),
        "initContainers: nothing of a run starts there",
    ),
    "a host's network without its names": (
        lambda d: (_pod(d).update(hostNetwork=True), _pod(d).pop("dnsPolicy", None)),
        "with hostNetwork pods find no Service",
    ),
    "nothing to run": (lambda d: d.pop(), "no Job and no JobSet: nothing would run"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_manifest_is_refused_by_name_in_one_line(fault):
    change, said = BROKEN[fault]
    found = _broken(change)
    assert any(said in line for line in found), found
    assert all("\n" not in line for line in found)


def test_a_broken_jobset_is_refused_too():
    def inner(documents: list[dict]) -> dict:
        return documents[0]["spec"]["replicatedJobs"][0]["template"]["spec"]

    for change, said in (
        (lambda d: inner(d).update(parallelism=1), "replicatedJobs[0].template.spec.completions: 2, parallelism 1"),
        (lambda d: d[0]["spec"]["replicatedJobs"][0].update(replicas=2), "one world of ranks is one job; keep one"),
        (lambda d: d[0]["spec"].update(failurPolicy={}), "failurPolicy: unknown field; did you mean failurePolicy?"),
        (lambda d: d[0]["spec"]["network"].update(enableDNSHostnames=False), "pods would have no names; write true"),
        (lambda d: d[0]["spec"]["network"].update(subdomain="other"), "the first pod is vit-mae-0a1b2c3d-n-0-0.other"),
    ):
        found = _broken(change, "jobset")
        assert any(said in line for line in found), found


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("mae-0a1b2c3d", "vit-mae-0a1b2c3d"),
        ("Pretrain_MAE.x-0a1b2c3d", "vit-pretrain-mae-x-0a1b2c3d-"),
        ("a" * 60 + "-0a1b2c3d", "vit-" + "a" * 35 + "-"),
    ],
)
def test_a_name_is_that_of_the_key_with_room_for_what_kubernetes_appends(key, name):
    made = job_name(key)
    assert made.startswith(name) and len(made) <= 48 < MOST_NAME
    assert job_name(key) == made != job_name(f"{key}x")
    assert problems(manifests(request_in(key=key), profile_with(nodes=1000), 1, (1, 1))) == []


def test_names_of_keys_that_differ_in_case_alone_differ():
    assert len({job_name(key) for key in ("run-a", "run_a", "Run-a", "run.a")}) == 4


def test_a_machine_that_failed_is_kept_away_from_where_another_has_room_whatever_the_affinity_is():
    for documents, avoided in (
        (manifests(request_in(), profile_with(), 1, (1, 1), ["gpu-7"]), ["gpu-7"]),
        (rendered("everything"), ["gpu-7", "gpu-9"]),
    ):
        node = _pod(documents)["affinity"]["nodeAffinity"]
        fields = [one["preference"]["matchFields"] for one in node["preferredDuringSchedulingIgnoredDuringExecution"]]
        assert fields == [[{"key": "metadata.name", "operator": "NotIn", "values": [name]}] for name in avoided]
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    assert node[required] == EVERYTHING["affinity"]["nodeAffinity"][required]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shared_memory": "1Gi"}, "profile.shared_memory: 1Gi is less than the 3072Mi that the ranks, micro-batches"),
        ({"memory": "2Gi"}, "profile.memory: 2Gi must hold the 3Gi of /dev/shm and the processes; raise it"),
        ({"grace_seconds": 60}, "terminationGracePeriodSeconds: 60: a checkpoint may take 180 s; raise it (profile.gr"),
        ({"env": {"WANDB_API_KEY": "x"}}, "WANDB_API_KEY: a secret must not stand in a manifest; name a Secret in"),
    ],
)
def test_what_a_profile_gets_wrong_about_a_run_is_found_before_submission(fields, said, tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    wrong, _ = KubernetesLauncher(profile_with(**fields)).objections(request_in(tmp_path))
    assert len(wrong) == 1 and said in wrong[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nodes": "4-2"}, "write the smaller number first: 2-4"),
        ({"memory": "480GB"}, "should match pattern"),
        ({"namespace": "My_Team"}, "should match pattern"),
        ({"volumes": []}, "at least 1 item"),
        ({"volumes": [*VOLUMES, {"claim": "b", "path": "/vit/"}]}, "/vit cannot be mounted, or not twice"),
        ({"volumes": [{"claim": "b", "path": "/dev/shm"}]}, "/dev/shm cannot be mounted"),
        ({"tolerations": [{"key": "a", "value": "b"}]}, "operator Equal takes a key and a value"),
        ({"labels": {"vit/run": "x"}}, "vit/run is set by the launcher"),
        ({"env": {"MASTER_ADDR": "x"}}, "MASTER_ADDR is set by the launcher"),
        ({"env": {"A": "b"}, "env_from_secret": {"A": {"secret": "s", "key": "k"}}}, "A stands in both; keep one"),
        ({"env_from_secret": {"A": "value"}}, "valid dictionary or instance of SecretKey"),
        ({"nodes": "2-4", "backend": "jobset"}, "a JobSet starts all its pods or none; write one number"),
        ({"image": "REGISTRY/vit:1"}, "String should match pattern"),
        ({"image": "https://r.example/vit"}, "String should match pattern"),
        ({"user": 0}, "greater than or equal to 1"),
        ({"gpus": 8}, "Extra inputs are not permitted"),
    ],
)
def test_a_profile_says_what_is_wrong_with_it(fields, said):
    with pytest.raises(ValidationError, match=said):
        profile_with(**fields)


def test_a_profile_is_read_by_its_kind_and_knows_its_nodes_and_ranks():
    given = {"kind": "kubernetes", "image": "vit:1", "volumes": VOLUMES, "nodes": "2-4", "cpus": 64}
    read = resolved_profile(TypeAdapter(Profile).validate_python(given))
    assert nodes_range(read) == (2, 4) and (read.ranks_per_node, read.loader_workers) == (8, 7)
    assert isinstance(launcher_for("kubernetes", read.model_dump()), KubernetesLauncher)
    with pytest.raises(ValueError, match="`sge` is not a place that runs jobs; use local, slurm or kubernetes"):
        launcher_for("sge", {})


@pytest.mark.parametrize("name", ["vit", "vit:1", "localhost:5000/vit:1", "R.example:5000/a/b_c:V1", "team/vit-x.y"])
def test_an_image_is_named_as_registries_spell_it(name):
    assert profile_with(image=name).image == name


def test_pods_of_a_range_that_a_queue_let_in_do_not_wait_for_those_it_left_out():
    def waits(**fields) -> str:
        env = _container(manifests(request_in(), profile_with(**fields), 1, (1, 1)))["env"]
        return next(one["value"] for one in env if one["name"] == "VIT_GATHER_SECONDS")

    assert waits(nodes="2-4", queue="q") == "300" and waits(nodes="2-4", queue="q", gather_minutes=1) == "60"
    assert waits(nodes="2-4") == waits(nodes=4, queue="q") == "3600"


def test_a_quantity_is_read_as_kubernetes_does():
    assert [bytes_of(text) for text in ("2Gi", "1500M", "1.5k", "7")] == [2 << 30, 1_500_000_000, 1500, 7]


def test_the_same_request_renders_the_same_text_and_writes_nothing(tmp_path):
    launcher = KubernetesLauncher(profile_with())
    assert launcher.render(request_in(tmp_path)) == launcher.render(request_in(tmp_path))
    assert list(tmp_path.iterdir()) == []
