"""The manifests of a job: a pure function of request and profile, compared with golden files.

`job`: an Indexed Job and the headless Service by which its pods find the first one. `jobset`: one JobSet, which makes
both itself and starts all pods again where one fails. A pod is a node; its only process is the supervisor, which gets
SIGTERM itself, reaps what its ranks leave, and ends with the code by which the Job decides:

    0 done    1, 2 the Job has failed    75, 76 counted, and the pod is made again    disrupted: not even counted
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.job import JobRequest
from cluster.kubernetes.profile import KubernetesProfile, bytes_of

MOST_NAME = 48  # of 63: for `-n-0` of a JobSet's job, the pod's index and five letters
PORT = 29500
MOST_WEIGHT = 100  # of a preference of the scheduler
CONTAINER = "supervisor"
REPLICATED_JOB = "n"
QUEUE_GATHER_MINUTES = 5.0  # to pull an image, where a queue let in a part of a range at once
LEAVE_SECONDS = 30  # between a stopped run's checkpoint and the kill
NOBODY_SPECIAL = 1000
RUN_LABEL, GENERATION_LABEL = "vit/run", "vit/generation"
DIRECTORY, KEY = "vit/directory", "vit/key"
FAILED, AGAIN = [1, 2], [75, 76]  # exit codes that end the job; that ask for another start
Manifest = dict[str, Any]


def job_name(key: str) -> str:
    """Name of Job, Service and label: DNS-1123, with room for what Kubernetes appends. Other keys give other names."""
    name = "vit-" + re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
    if name == f"vit-{key}" and len(name) <= MOST_NAME:
        return name
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{name[: MOST_NAME - 9].rstrip('-')}-{digest}"


def job_id(name: str, generation: int | str) -> str:
    """By which this job is told from those that had its name before."""
    return f"{name}:{generation}"


def manifests(
    request: JobRequest, profile: KubernetesProfile, generation: int, owner: tuple[int, int],
    avoided: Sequence[str] = (),
) -> list[Manifest]:  # fmt: skip
    """What is applied, in this order. `owner`: user and group of the pods; `avoided`: machines to keep away from."""
    name = job_name(request.key)
    labels = profile.labels | {
        "app.kubernetes.io/name": "vit", "app.kubernetes.io/managed-by": "vit", RUN_LABEL: name,
        GENERATION_LABEL: str(generation),
    }  # fmt: skip
    annotations = profile.annotations | {DIRECTORY: str(request.directory), KEY: request.key}
    metadata = {"name": name, "namespace": profile.namespace, "labels": labels, "annotations": annotations}
    pod = {
        "metadata": {"labels": labels, "annotations": annotations},
        "spec": _pod(request, profile, generation, owner, avoided),
    }
    if profile.backend == "jobset":
        return [_jobset(metadata, pod, profile)]
    return [_service(metadata), _job(metadata, pod, profile)]


def manifest_text(documents: Sequence[Manifest]) -> str:
    """YAML that `kubectl apply -f` takes."""
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=1000, explicit_start=True)


class _Plain(yaml.SafeDumper):
    """Without anchors: labels stand in many places, and people read this."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def nodes_of(profile: KubernetesProfile) -> tuple[int, int]:
    """Least and most pods."""
    least, _, most = str(profile.nodes).partition("-")
    return int(least), int(most or least)


def gather_minutes(profile: KubernetesProfile) -> float:
    """How long pods wait for each other. Those of a range that Kueue left out never come: waiting would cost GPUs."""
    least, most = nodes_of(profile)
    return (
        min(profile.gather_minutes, QUEUE_GATHER_MINUTES) if profile.queue and least < most else profile.gather_minutes
    )


def grace_seconds(request: JobRequest, profile: KubernetesProfile) -> int:
    """Between SIGTERM and SIGKILL."""
    return profile.grace_seconds or math.ceil(request.stop_lead_seconds) + LEAVE_SECONDS


def shared_memory(request: JobRequest, profile: KubernetesProfile) -> str:
    """Size of /dev/shm: the profile's, else whole GiB for what the ranks of a pod share."""
    return profile.shared_memory or f"{max(1, math.ceil(request.shared_memory_bytes / 2**30))}Gi"


def _service(metadata: Manifest) -> Manifest:
    name = metadata["name"]
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the pods meet before any of them is ready
            "selector": {RUN_LABEL: name},
            "ports": [{"name": "meeting", "port": PORT}],
        },
    }  # fmt: skip


def _job(metadata: Manifest, pod: Manifest, profile: KubernetesProfile) -> Manifest:
    least, most = nodes_of(profile)
    # One incident ends every pod of the start, and each counts; an eviction all but the pod that was evicted.
    spec = _job_spec(pod, profile, backoff_limit=most * profile.max_restarts)
    labels, annotations = dict(metadata["labels"]), dict(metadata["annotations"])
    if profile.queue:
        labels["kueue.x-k8s.io/queue-name"] = profile.queue
        spec = {"suspend": True} | spec  # Kueue lets it go when all its pods have room
        if least < most:
            annotations["kueue.x-k8s.io/job-min-parallelism"] = str(least)
            annotations["kueue.x-k8s.io/job-completions-equal-parallelism"] = "true"
    if profile.keep_finished_hours:
        spec["ttlSecondsAfterFinished"] = 3600 * profile.keep_finished_hours
    metadata = metadata | {"labels": labels, "annotations": annotations}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _job_spec(pod: Manifest, profile: KubernetesProfile, backoff_limit: int) -> Manifest:
    _, most = nodes_of(profile)
    by_code = {"containerName": CONTAINER, "operator": "In"}
    no_condition: Manifest = {"onPodConditions": []}  # the schema of 1.27 demands it, of every rule
    return {
        "completionMode": "Indexed",
        "completions": most,
        "parallelism": most,
        "backoffLimit": backoff_limit,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": by_code | {"values": FAILED}, **no_condition},
                {"action": "Count", "onExitCodes": by_code | {"values": AGAIN}, **no_condition},
            ]
        },
        "template": pod,
    }


def _jobset(metadata: Manifest, pod: Manifest, profile: KubernetesProfile) -> Manifest:
    labels = dict(metadata["labels"])
    if profile.queue:
        labels["kueue.x-k8s.io/queue-name"] = profile.queue
    spec: Manifest = {"suspend": True} if profile.queue else {}
    spec |= {
        "network": {"enableDNSHostnames": True, "subdomain": metadata["name"], "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": profile.max_restarts,
            "rules": [
                {"name": "ended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
            ],
        },
        "replicatedJobs": [
            # One pod that fails fails its job, and then the JobSet starts all pods again.
            {"name": REPLICATED_JOB, "replicas": 1, "template": {"spec": _job_spec(pod, profile, backoff_limit=0)}},
        ],
    }  # fmt: skip
    if profile.keep_finished_hours:
        spec["ttlSecondsAfterFinished"] = 3600 * profile.keep_finished_hours
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata | {"labels": labels},
        "spec": spec,
    }  # fmt: skip


def _pod(
    request: JobRequest, profile: KubernetesProfile, generation: int, owner: tuple[int, int], avoided: Sequence[str]
) -> Manifest:
    user, group = owner
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_seconds(request, profile),
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": user, "runAsGroup": group, "fsGroup": group,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
    }  # fmt: skip
    if profile.backend == "job":
        spec = {"subdomain": job_name(request.key)} | spec
    given = {
        "serviceAccountName": profile.service_account,
        "priorityClassName": profile.priority_class,
        "runtimeClassName": profile.runtime_class,
        "nodeSelector": profile.node_selector,
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in profile.tolerations],
        "affinity": _affinity(profile.affinity, avoided),
        "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
    }
    spec |= {name: value for name, value in given.items() if value}
    if profile.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    size = shared_memory(request, profile)
    spec["containers"] = [_container(request, profile, generation)]
    claims = dict.fromkeys(volume.claim for volume in profile.volumes)
    spec["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]
    spec["volumes"] += [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
        for number, claim in enumerate(claims)
    ]
    return spec


def _container(request: JobRequest, profile: KubernetesProfile, generation: int) -> Manifest:
    command = list(request.command)
    if Path(command[0]).name.startswith("python"):  # the submitter's interpreter
        command[0] = profile.python
    capabilities: Manifest = {"drop": ["ALL"]} | ({"add": ["IPC_LOCK"]} if profile.rdma else {})
    claims = list(dict.fromkeys(volume.claim for volume in profile.volumes))
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    for volume in profile.volumes:
        mount = {"name": f"claim-{claims.index(volume.claim)}", "mountPath": volume.path}
        more = {"subPath": volume.subpath, "readOnly": volume.read_only or None}
        mounts.append(mount | {name: value for name, value in more.items() if value})
    container = {
        "name": CONTAINER,
        "image": profile.image,
        "imagePullPolicy": profile.image_pull_policy,
        "command": command,
        "workingDir": str(request.directory),
        "env": _environment(request, profile, generation),
        "ports": [{"name": "meeting", "containerPort": PORT}],
        "terminationMessagePolicy": "FallbackToLogsOnError",  # what it said last stands in the pod's state
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": capabilities},
        "volumeMounts": mounts,
    }
    if resources := _resources(profile):
        container["resources"] = resources
    return container


def _resources(profile: KubernetesProfile) -> Manifest:
    """Quantities as text. Of accelerators, memory and devices the request is the limit; cores are not throttled."""
    limits = {"memory": profile.memory} if profile.memory else {}
    if profile.accelerators_per_node:
        limits[profile.accelerator_resource] = str(profile.accelerators_per_node)
    if profile.rdma:
        limits[profile.rdma.resource] = str(profile.rdma.count)
    requests = ({"cpu": str(profile.cpus)} if profile.cpus else {}) | limits
    return {name: value for name, value in (("requests", requests), ("limits", limits)) if value}


def _environment(request: JobRequest, profile: KubernetesProfile, generation: int) -> list[Manifest]:
    name = job_name(request.key)
    first = f"{name}-0" if profile.backend == "job" else f"{name}-{REPLICATED_JOB}-0-0"
    ours = {
        "MASTER_ADDR": f"{first}.{name}",
        "MASTER_PORT": str(PORT),
        "VIT_JOB": job_id(name, generation),
        "VIT_START": str(generation),
        "VIT_NODES": str(profile.nodes),
        "VIT_GATHER_SECONDS": f"{60 * gather_minutes(profile):.0f}",
    }
    # A user that only a number knows has neither home nor name, and caches want both.
    defaults = {"HOME": "/tmp", "USER": "vit", "PYTHONUNBUFFERED": "1"}
    literal = defaults | profile.env | dict(request.environment) | ours
    variables: list[Manifest] = [{"name": one, "value": value} for one, value in literal.items()]
    variables += [_field("VIT_POD", "metadata.uid"), _field("VIT_NODE_NAME", "spec.nodeName")]
    variables += [
        {"name": one, "valueFrom": {"secretKeyRef": {"name": value.secret, "key": value.key}}}
        for one, value in profile.env_from_secret.items()
    ]
    return variables


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _affinity(given: Mapping[str, Any], avoided: Sequence[str]) -> Manifest:
    """The profile's affinity, and rather not those machines: where no other has room they are better than none."""
    if not avoided:
        return dict(given)
    away = [{"key": "metadata.name", "operator": "NotIn", "values": [machine]} for machine in avoided]
    node = dict(given.get("nodeAffinity") or {})
    preferred = node.get("preferredDuringSchedulingIgnoredDuringExecution") or []
    away = [{"weight": MOST_WEIGHT, "preference": {"matchFields": [one]}} for one in away]
    node["preferredDuringSchedulingIgnoredDuringExecution"] = [*preferred, *away]
    return dict(given) | {"nodeAffinity": node}


def memory_problem(request: JobRequest, profile: KubernetesProfile) -> str | None:
    """What is wrong with shared memory or grace, in a line with the key and the fix."""
    least = request.shared_memory_bytes
    if profile.shared_memory and bytes_of(profile.shared_memory) < least:
        return (
            f"profile.shared_memory: {profile.shared_memory} is less than the {math.ceil(least / 2**20)}Mi that the "
            "ranks, micro-batches and loader workers of a pod may share; raise it, or leave it out"
        )
    size = shared_memory(request, profile)
    if profile.memory and bytes_of(profile.memory) <= bytes_of(size):
        return f"profile.memory: {profile.memory} must hold the {size} of /dev/shm and the processes; raise it"
    return None
