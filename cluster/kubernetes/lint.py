"""What a job's manifests must say beyond their schema: `problems` names each fault in a line with its place and fix.

Schemas catch misspelt fields and wrong types, a server most of the rest, and only when it is asked; both let a Service
pass by which no pod is found. It knows the objects that `manifest` makes, also after somebody has edited them.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from cluster.kubernetes.profile import LABEL, QUANTITY, SUBDOMAIN, bytes_of
from cluster.kubernetes.security import security_problems

MOST_NAME = 52  # with `-NN-xxxxx` behind it a pod's name is a host's name of at most 63
API_VERSIONS = {"Job": "batch/v1", "JobSet": "jobset.x-k8s.io/v1alpha2", "Service": "v1"}
WORDS = {
    "completionMode": ("Indexed",),
    "restartPolicy": ("Never",),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
}
GENERATION_LABEL, QUEUE_LABEL = "vit/generation", "kueue.x-k8s.io/queue-name"
OPERATORS, EFFECTS = ("Exists", "Equal"), ("NoSchedule", "PreferNoSchedule", "NoExecute")
FIELDS = {
    "job": """activeDeadlineSeconds backoffLimit completionMode completions parallelism podFailurePolicy
        podReplacementPolicy suspend template ttlSecondsAfterFinished""",
    "pod": """affinity automountServiceAccountToken containers dnsConfig dnsPolicy enableServiceLinks hostIPC
        hostNetwork imagePullSecrets initContainers nodeSelector priorityClassName restartPolicy runtimeClassName
        schedulerName securityContext serviceAccountName setHostnameAsFQDN subdomain terminationGracePeriodSeconds
        tolerations topologySpreadConstraints volumes""",
    "container": """args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports readinessProbe
        resources securityContext startupProbe terminationMessagePath terminationMessagePolicy volumeMounts
        workingDir""",
    "service": "clusterIP ports publishNotReadyAddresses selector type",
    "jobset": "failurePolicy network replicatedJobs startupPolicy successPolicy suspend ttlSecondsAfterFinished",
    "policy": "action onExitCodes onPodConditions",
}
_SECRET = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY(?!_ID)|PRIVATE_?KEY)", re.I)
_WHOLE = ("gpu", "rdma", "hca", "roce")
_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"


class Needs(NamedTuple):
    """What the run wants of its pods; 0 where nothing is known."""

    stop_lead_seconds: float = 0.0
    shared_memory_bytes: int = 0
    on_volume: bool = True  # False: that the run directory lies on none is told already


NOTHING = Needs()


def problems(documents: Sequence[Any], needs: Needs = NOTHING) -> list[str]:
    """Every fault of one job's manifests, each `KIND/NAME: field: value: rule; fix`."""
    found = []
    for document in documents:
        if not isinstance(document, dict):
            found.append(f"{document!r}: a manifest is a mapping; write apiVersion, kind, metadata and spec")
            continue
        place = f"{document.get('kind', '?')}/{(document.get('metadata') or {}).get('name', '?')}"
        try:
            found += [f"{place}: {line}" for line in _of_document(document, documents, needs)]
        except (AttributeError, TypeError, ValueError) as error:  # something is not the list or mapping it has to be
            found.append(f"{place}: a field has the wrong type: {error}")
    kinds = [document.get("kind") for document in documents if isinstance(document, dict)]
    for kind in sorted({str(kind) for kind in kinds if kinds.count(kind) > 1}):
        found.append(f"{kind}: stands {kinds.count(kind)} times; a run is one job with one Service; keep one")
    if not {"Job", "JobSet"} & set(kinds):
        found.append("no Job and no JobSet: nothing would run; add one")
    return found


def _of_document(document: dict, documents: Sequence[dict], needs: Needs) -> Iterator[str]:
    kind = document.get("kind")
    if kind not in API_VERSIONS:
        yield f"kind: {kind}: not one of a job; use {', '.join(API_VERSIONS)}"
        return
    if document.get("apiVersion") != API_VERSIONS[kind]:
        yield f"apiVersion: {document.get('apiVersion')}: {kind} is of {API_VERSIONS[kind]}; write that"
    yield from _unknown(document, "apiVersion kind metadata spec", "")
    yield from _metadata(document.get("metadata") or {})
    spec = document.get("spec") or {}
    if kind == "Service":
        yield from _service(spec)
    elif kind == "Job":
        labels = (document.get("metadata") or {}).get("labels") or {}
        if QUEUE_LABEL in labels and "suspend" not in spec:
            yield f"spec.suspend: missing: the queue {labels[QUEUE_LABEL]} lets in what is suspended; write true"
        yield from _job(spec, "spec", needs)
        yield from _meeting_by_service(document, documents)
    else:
        yield from _jobset(document, spec, needs)


def _unknown(given: dict, fields: str, place: str) -> Iterator[str]:
    known = fields.split()
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            yield f"{place}{name}: unknown field; {f'did you mean {near[0]}?' if near else 'leave it out'}"


def _metadata(metadata: dict) -> Iterator[str]:
    name = metadata.get("name")
    if not isinstance(name, str) or not re.fullmatch(LABEL, name):
        yield f"metadata.name: {name}: must be lower-case letters, digits and - (DNS-1123); rename it"
    elif len(name) > MOST_NAME:
        yield f"metadata.name: {name}: has {len(name)} letters, and -NN-xxxxx must fit behind; use at most {MOST_NAME}"
    for key, value in (metadata.get("labels") or {}).items():
        if not isinstance(value, str) or not re.fullmatch(_VALUE, value):
            yield f"metadata.labels.{key}: {value!r}: must be text of at most 63 letters, digits, -, _ and ."


def _service(spec: dict) -> Iterator[str]:
    yield from _unknown(spec, FIELDS["service"], "spec.")
    if spec.get("clusterIP") != "None":
        yield f"spec.clusterIP: {spec.get('clusterIP')}: pods have names only behind a headless Service; write None"
    if spec.get("publishNotReadyAddresses") is not True:
        yield "spec.publishNotReadyAddresses: pods meet before they are ready; write true"


def _job(spec: dict, place: str, needs: Needs, *, restarts_inside: bool = True) -> Iterator[str]:
    yield from _unknown(spec, FIELDS["job"], f"{place}.")
    if spec.get("completionMode") not in WORDS["completionMode"]:
        yield f"{place}.completionMode: {spec.get('completionMode')}: ranks need an index each; write Indexed"
    completions, parallelism = spec.get("completions"), spec.get("parallelism")
    for name, value in (("completions", completions), ("parallelism", parallelism)):
        if value is None:
            yield f"{place}.{name}: missing: an Indexed Job has one for each node; write how many"
        elif not _is_count(value):
            yield f"{place}.{name}: {value!r}: must be a whole number from 1; write it without quotes"
    if _is_count(completions) and _is_count(parallelism) and completions != parallelism:
        yield f"{place}.completions: {completions}, parallelism {parallelism}: all ranks run at once; make them equal"
    limit = spec.get("backoffLimit")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        yield f"{place}.backoffLimit: {limit!r}: must be a whole number, nodes x restarts; write it"
    elif restarts_inside and _is_count(completions) and limit % completions:
        yield f"{place}.backoffLimit: {limit}: each of {completions} pods counts in one incident; make it a multiple"
    if "activeDeadlineSeconds" in spec:
        yield f"{place}.activeDeadlineSeconds: {spec['activeDeadlineSeconds']}: would end the run; leave it out"
    if spec.get("podReplacementPolicy", "Failed") != "Failed":
        policy = spec["podReplacementPolicy"]
        yield f"{place}.podReplacementPolicy: {policy}: two pods would have one index; write Failed"
    template = spec.get("template") or {}
    yield from _variables_of_job(spec, template, f"{place}.template.spec")
    yield from _unknown(template, "metadata spec", f"{place}.template.")
    pod = template.get("spec") or {}
    yield from _failure_policy(spec.get("podFailurePolicy"), pod, f"{place}.podFailurePolicy")
    yield from _pod(pod, f"{place}.template.spec", needs)


def _failure_policy(policy: Any, pod: dict, place: str) -> Iterator[str]:
    if policy is None:
        yield f"{place}: missing: codes 1 and 2 would be tried again; add its rules"
        return
    if pod.get("restartPolicy") != "Never":
        yield f"{place}: is allowed with restartPolicy Never alone, not {pod.get('restartPolicy')}; write Never"
    decided: dict[int, str] = {}
    names = [container.get("name") for container in pod.get("containers") or []]
    for number, rule in enumerate(policy.get("rules") or []):
        here = f"{place}.rules[{number}]"
        yield from _unknown(rule, FIELDS["policy"], f"{here}.")
        if rule.get("action") not in ("Ignore", "FailJob", "Count", "FailIndex"):
            yield f"{here}.action: {rule.get('action')}: unknown; use Ignore, FailJob or Count"
        codes = rule.get("onExitCodes")
        if (not codes) == (not rule.get("onPodConditions")):
            yield f"{here}: needs either onExitCodes or onPodConditions, not both; keep one"
        if not codes:
            continue
        if codes.get("operator") != "In":
            yield f"{here}.onExitCodes.operator: {codes.get('operator')}: would decide of every other code; use In"
        if (name := codes.get("containerName")) not in (None, *names):
            yield f"{here}.onExitCodes.containerName: {name}: no such container; use {', '.join(map(str, names))}"
        if 0 in codes.get("values", []):
            yield f"{here}.onExitCodes.values: 0 is no failure; take it out"
        decided |= {code: rule.get("action") for code in codes.get("values", []) if code not in decided}
    first = (policy.get("rules") or [{}])[0]
    conditions = [(one.get("type"), one.get("status", "True")) for one in first.get("onPodConditions") or []]
    if first.get("action") != "Ignore" or conditions != [("DisruptionTarget", "True")]:
        yield f"{place}.rules[0]: an evicted pod must not count; Ignore DisruptionTarget before all else"
    for code, action in ((1, "FailJob"), (2, "FailJob"), (75, "Count"), (76, "Count")):
        if decided.get(code) != action:
            yield f"{place}: exit code {code} has {decided.get(code, 'no rule')}; give it {action}"


def _pod(pod: dict, place: str, needs: Needs) -> Iterator[str]:
    yield from _unknown(pod, FIELDS["pod"], f"{place}.")
    if pod.get("restartPolicy") not in WORDS["restartPolicy"]:
        yield f"{place}.restartPolicy: {pod.get('restartPolicy')}: the Job makes pods again, not the node; write Never"
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if not _is_count(grace) or grace < needs.stop_lead_seconds:
        yield (
            f"{place}.terminationGracePeriodSeconds: {grace}: a checkpoint may take {needs.stop_lead_seconds:.0f} s; "
            "raise it (profile.grace_seconds)"
        )
    if "dnsPolicy" in pod and pod["dnsPolicy"] not in WORDS["dnsPolicy"]:
        yield f"{place}.dnsPolicy: {pod['dnsPolicy']}: unknown; use {', '.join(WORDS['dnsPolicy'])}"
    security = pod.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True or security.get("runAsUser") == 0:
        yield f"{place}.securityContext: pods run as root; set runAsNonRoot and a runAsUser above 0"
    yield from security_problems(pod, place)
    yield from _tolerations(pod.get("tolerations") or [], f"{place}.tolerations")
    containers = pod.get("containers") or []
    if not containers:
        yield f"{place}.containers: there is none; add one"
    volumes = pod.get("volumes") or []
    for number, container in enumerate(containers):
        yield from _container(container, volumes, f"{place}.containers[{number}]")
    for volume in volumes:
        if len(volume) != 2:
            yield f"{place}.volumes: {volume.get('name')}: must have a name and one source; write persistentVolumeClaim"
    if needs.on_volume:
        yield from _working_directory(containers, f"{place}.containers")
    yield from _shared_memory(containers, volumes, place, needs)


def _working_directory(containers: Sequence[dict], place: str) -> Iterator[str]:
    for number, container in enumerate(containers):
        folder = str(container.get("workingDir", ""))
        paths = [str(mount.get("mountPath")) for mount in container.get("volumeMounts") or []]
        if not any(path != "/dev/shm" and f"{folder}/".startswith(f"{path.rstrip('/')}/") for path in paths):
            yield f"{place}[{number}].workingDir: {folder}: no volume is mounted there, where the run lies; mount it"


def _variables_of_job(spec: dict, template: dict, place: str) -> Iterator[str]:
    """What pods agree by must be what the Job says."""
    labels = (template.get("metadata") or {}).get("labels") or {}
    for container in (template.get("spec") or {}).get("containers") or []:
        given = {one.get("name"): one for one in container.get("env") or []}
        source = (given.get("VIT_POD", {}).get("valueFrom") or {}).get("fieldRef") or {}
        if source.get("fieldPath") != "metadata.uid":
            yield f"{place}: VIT_POD: pods would not be told apart; write a fieldRef of metadata.uid"
        start, nodes = (given.get(name, {}).get("value") for name in ("VIT_START", "VIT_NODES"))
        if start != (generation := labels.get(GENERATION_LABEL)):
            yield f"{place}: VIT_START {start}: the label {GENERATION_LABEL} is {generation}; make them equal"
        if str(nodes).rpartition("-")[2] != str(spec.get("completions")):
            yield f"{place}: VIT_NODES {nodes}: completions are {spec.get('completions')}; make them equal"


def _tolerations(tolerations: Iterable[dict], place: str) -> Iterator[str]:
    for number, one in enumerate(tolerations):
        if one.get("operator", "Equal") not in OPERATORS:
            yield f"{place}[{number}].operator: {one['operator']}: unknown; use {' or '.join(OPERATORS)}"
        elif one.get("operator") == "Exists" and one.get("value"):
            yield f"{place}[{number}].value: {one['value']}: Exists takes no value; leave it out, or use Equal"
        if one.get("effect") not in (None, *EFFECTS):
            yield f"{place}[{number}].effect: {one['effect']}: unknown; use {', '.join(EFFECTS)}"


def _container(container: dict, volumes: Sequence[dict], place: str) -> Iterator[str]:
    yield from _unknown(container, FIELDS["container"], f"{place}.")
    name = container.get("name")
    if not isinstance(name, str) or not re.fullmatch(LABEL, name):
        yield f"{place}.name: {name}: must be lower-case letters, digits and - (DNS-1123); rename it"
    if not container.get("image"):
        yield f"{place}.image: missing: there is nothing to run; name one (profile.image)"
    for field in ("imagePullPolicy", "terminationMessagePolicy"):
        if field in container and container[field] not in WORDS[field]:
            yield f"{place}.{field}: {container[field]}: unknown; use {', '.join(WORDS[field])}"
    command = container.get("command")
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        yield f"{place}.command: {command!r}: must be a list of words; write one"
    yield from _resources(container.get("resources") or {}, f"{place}.resources")
    yield from _variables(container.get("env") or [], f"{place}.env")
    known, paths = {volume.get("name") for volume in volumes}, set()
    for mount in container.get("volumeMounts") or []:
        if mount.get("name") not in known:
            yield f"{place}.volumeMounts: {mount.get('name')}: no volume has that name; add it to volumes"
        if not str(mount.get("mountPath", "")).startswith("/"):
            yield f"{place}.volumeMounts: {mount.get('mountPath')}: must begin with /; write the whole path"
        if mount.get("mountPath") in paths:
            yield f"{place}.volumeMounts: {mount['mountPath']}: is mounted twice; keep one"
        paths.add(mount.get("mountPath"))


def _resources(resources: dict, place: str) -> Iterator[str]:
    yield from _unknown(resources, "requests limits claims", f"{place}.")
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for kind, given in (("requests", requests), ("limits", limits)):
        for name, value in given.items():
            if not isinstance(value, str):
                yield f'{place}.{kind}.{name}: {value}: quantities are text; write "{value}"'
            elif not re.fullmatch(QUANTITY, value):
                yield f"{place}.{kind}.{name}: {value}: not a quantity; write it as 16Gi, 500m or 8"
            elif _is_device(name) and not value.isdigit():
                yield f"{place}.{kind}.{name}: {value}: a device is not divided; write a whole number"
    for name in {*requests, *limits}:
        if _is_device(name) and requests.get(name, limits.get(name)) != limits.get(name):
            yield (
                f"{place}: {name}: requests {requests.get(name)} and limits {limits.get(name)}: devices are not "
                "overcommitted; make them equal"
            )


def _is_device(name: str) -> bool:
    """Whether a resource is of a device plugin: those have a domain, and come whole."""
    return "/" in name or any(word in name for word in _WHOLE)


def _variables(variables: Iterable[dict], place: str) -> Iterator[str]:
    seen = set()
    for one in variables:
        name = one.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
            yield f"{place}: {name}: not a variable's name; rename it"
            continue
        if name in seen:
            yield f"{place}: {name}: stands twice; keep one"
        seen.add(name)
        if "value" in one and not isinstance(one["value"], str):
            yield f"{place}: {name}: {one['value']!r} is no text; quote it"
        if one.get("value") and _SECRET.search(name):
            yield f"{place}: {name}: a secret must not stand in a manifest; name a Secret in profile.env_from_secret"


def _shared_memory(containers: Sequence[dict], volumes: Sequence[dict], place: str, needs: Needs) -> Iterator[str]:
    mounted = {
        mount.get("name")
        for container in containers
        for mount in container.get("volumeMounts") or []
        if mount.get("mountPath") == "/dev/shm"
    }
    found = [volume for volume in volumes if volume.get("name") in mounted]
    if not found:
        yield f"{place}.volumes: /dev/shm is a container's 64 MiB; mount an emptyDir of medium Memory there"
    for volume in found:
        folder = volume.get("emptyDir") or {}
        if folder.get("medium") != "Memory":
            yield f"{place}.volumes: {volume['name']}: /dev/shm lies on a disk; write medium: Memory"
        size = folder.get("sizeLimit")
        if not isinstance(size, str) or not re.fullmatch(QUANTITY, size):
            yield f"{place}.volumes: {volume['name']}: sizeLimit {size}: not a quantity; write it as 16Gi"
        elif bytes_of(size) < needs.shared_memory_bytes:
            yield (
                f"{place}.volumes: {volume['name']}: sizeLimit {size}: ranks, micro-batches and workers may share "
                f"{needs.shared_memory_bytes >> 20}Mi; raise it (profile.shared_memory)"
            )


def _meeting_by_service(document: dict, documents: Sequence[dict]) -> Iterator[str]:
    template = (document.get("spec") or {}).get("template") or {}
    pod = template.get("spec") or {}
    subdomain = pod.get("subdomain")
    if not subdomain:
        yield "spec.template.spec.subdomain: missing: pods would have no names; write that of a headless Service"
        return
    services = [one for one in documents if isinstance(one, dict) and one.get("kind") == "Service"]
    service = next((one for one in services if (one.get("metadata") or {}).get("name") == subdomain), None)
    if service is None:
        yield f"spec.template.spec.subdomain: {subdomain}: there is no Service of that name; add a headless one"
    else:
        labels = (template.get("metadata") or {}).get("labels") or {}
        selector = (service.get("spec") or {}).get("selector") or {}
        if not selector or any(labels.get(name) != value for name, value in selector.items()):
            yield f"spec.template.metadata.labels: Service {subdomain} selects other pods; make them agree"
        if service["metadata"].get("namespace") != (namespace := document["metadata"].get("namespace")):
            yield f"metadata.namespace: {namespace}: its Service is in another; make them equal"
    yield from _address(pod, f"{document['metadata'].get('name')}-0.{subdomain}", "spec.template.spec")


def _address(pod: dict, host: str, place: str) -> Iterator[str]:
    for container in pod.get("containers") or []:
        given = [one.get("value") for one in container.get("env") or [] if one.get("name") == "MASTER_ADDR"]
        if given != [host]:
            yield f"{place}: MASTER_ADDR {given[0] if given else 'is missing'}: the first pod is {host}; write that"


def _jobset(document: dict, spec: dict, needs: Needs) -> Iterator[str]:
    yield from _unknown(spec, FIELDS["jobset"], "spec.")
    name = document["metadata"].get("name")
    network = spec.get("network") or {}
    yield from _unknown(network, "enableDNSHostnames publishNotReadyAddresses subdomain", "spec.network.")
    if network.get("enableDNSHostnames") is not True:
        yield "spec.network.enableDNSHostnames: pods would have no names; write true"
    subdomain = network.get("subdomain", name)
    if not isinstance(subdomain, str) or not re.fullmatch(SUBDOMAIN, subdomain):
        yield f"spec.network.subdomain: {subdomain}: must be lower-case letters, digits and - (DNS-1123); rename it"
    jobs = spec.get("replicatedJobs") or []
    if len(jobs) != 1 or jobs[0].get("replicas", 1) != 1:
        yield "spec.replicatedJobs: one world of ranks is one job; keep one, with replicas 1"
    for number, job in enumerate(jobs):
        place = f"spec.replicatedJobs[{number}]"
        yield from _unknown(job, "name replicas template groupName", f"{place}.")
        inner = (job.get("template") or {}).get("spec") or {}
        yield from _job(inner, f"{place}.template.spec", needs, restarts_inside=False)
        pod = (inner.get("template") or {}).get("spec") or {}
        host = f"{name}-{job.get('name')}-0-0.{subdomain}"
        yield from _address(pod, host, f"{place}.template.spec.template.spec")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
