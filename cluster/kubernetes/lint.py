"""What a job's manifests must say beyond their schema: `problems` names each fault in a line with its place and fix.

Schemas catch misspelt fields and wrong types, a server most of the rest, and only when it is asked; both let a Service
pass by which no pod is found. It knows the objects that `manifest` makes, also after somebody has edited them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.kubernetes.lint_fields import FIELDS, NOTHING, WORDS, Needs, is_count, unknown_fields
from cluster.kubernetes.lint_pods import pod_problems
from cluster.kubernetes.profile import LABEL, SUBDOMAIN
from cluster.kubernetes.security import secret_problems

MOST_NAME = 52  # with `-NN-xxxxx` behind it a pod's name is a host's name of at most 63
API_VERSIONS = {"Job": "batch/v1", "JobSet": "jobset.x-k8s.io/v1alpha2", "Service": "v1"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RUN_LABEL, GENERATION_LABEL, DIRECTORY = "vit/run", "vit/generation", "vit/directory"
_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"


def problems(documents: Sequence[Any], needs: Needs = NOTHING) -> list[str]:
    """Every fault of one job's manifests, each `KIND/NAME: field: value: rule; fix`."""
    found = []
    for document in documents:
        if not isinstance(document, dict):
            found.append(f"{document!r}: a manifest is a mapping; write apiVersion, kind, metadata and spec")
            continue
        metadata = document.get("metadata")
        place = f"{document.get('kind', '?')}/{metadata.get('name', '?') if isinstance(metadata, dict) else '?'}"
        try:
            found += [f"{place}: {line}" for line in _of_document(document, documents, needs)]
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # not the list or mapping it has to be
            found.append(f"{place}: a field has the wrong type: {error}".replace("\n", " "))
    kinds = [document.get("kind") for document in documents if isinstance(document, dict)]
    kinds = [kind for kind in kinds if isinstance(kind, str)]
    for kind in sorted({str(kind) for kind in kinds if kinds.count(kind) > 1}):
        found.append(f"{kind}: stands {kinds.count(kind)} times; a run is one job with one Service; keep one")
    if not {"Job", "JobSet"} & set(kinds):
        found.append("no Job and no JobSet: nothing would run; add one")
    return found


def _of_document(document: dict, documents: Sequence[dict], needs: Needs) -> Iterator[str]:
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in API_VERSIONS:
        yield f"kind: {kind}: not one of a job; use {', '.join(API_VERSIONS)}"
        return
    if document.get("apiVersion") != API_VERSIONS[kind]:
        yield f"apiVersion: {document.get('apiVersion')}: {kind} is of {API_VERSIONS[kind]}; write that"
    yield from unknown_fields(document, "apiVersion kind metadata spec", "")
    yield from _metadata(document.get("metadata") or {})
    yield from secret_problems(document)
    spec = document.get("spec") or {}
    if kind == "Service":
        yield from _service(spec)
    elif kind == "Job":
        yield from _queue(document["metadata"], spec)
        yield from _job(spec, "spec", document["metadata"], needs)
        yield from _meeting_by_service(document, documents)
    else:
        yield from _queue(document["metadata"], spec)
        yield from _jobset(document, spec, needs)


def _queue(metadata: dict, spec: dict) -> Iterator[str]:
    queue, suspended = (metadata.get("labels") or {}).get(QUEUE_LABEL), spec.get("suspend")
    if queue and suspended is not True:
        said = "missing" if suspended is None else suspended
        yield f"spec.suspend: {said}: the queue {queue} lets in what is suspended; write true"
    elif suspended and not queue:
        yield f"spec.suspend: {suspended}: without the label {QUEUE_LABEL} nothing lets it go; leave it out"


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
    yield from unknown_fields(spec, FIELDS["service"], "spec.")
    if spec.get("clusterIP") != "None":
        yield f"spec.clusterIP: {spec.get('clusterIP')}: pods have names only behind a headless Service; write None"
    if spec.get("publishNotReadyAddresses") is not True:
        yield "spec.publishNotReadyAddresses: pods meet before they are ready; write true"


def _job(spec: dict, place: str, metadata: dict, needs: Needs, *, restarts_inside: bool = True) -> Iterator[str]:
    yield from unknown_fields(spec, FIELDS["job"], f"{place}.")
    if spec.get("completionMode") not in WORDS["completionMode"]:
        yield f"{place}.completionMode: {spec.get('completionMode')}: ranks need an index each; write Indexed"
    completions, parallelism = spec.get("completions"), spec.get("parallelism")
    for name, value in (("completions", completions), ("parallelism", parallelism)):
        if value is None:
            yield f"{place}.{name}: missing: an Indexed Job has one for each node; write how many"
        elif not is_count(value):
            yield f"{place}.{name}: {value!r}: must be a whole number from 1; write it without quotes"
    if is_count(completions) and is_count(parallelism) and completions != parallelism:
        yield f"{place}.completions: {completions}, parallelism {parallelism}: all ranks run at once; make them equal"
    limit = spec.get("backoffLimit")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
        yield f"{place}.backoffLimit: {limit!r}: must be a whole number, nodes x restarts; write it"
    elif restarts_inside and is_count(completions) and limit % completions:
        yield f"{place}.backoffLimit: {limit}: each of {completions} pods counts in one incident; make it a multiple"
    if "activeDeadlineSeconds" in spec:
        yield f"{place}.activeDeadlineSeconds: {spec['activeDeadlineSeconds']}: would end the run; leave it out"
    if spec.get("podReplacementPolicy", "Failed") != "Failed":
        policy = spec["podReplacementPolicy"]
        yield f"{place}.podReplacementPolicy: {policy}: two pods would have one index; write Failed"
    template = spec.get("template") or {}
    yield from _agreement(spec, template, metadata, f"{place}.template")
    yield from unknown_fields(template, "metadata spec", f"{place}.template.")
    pod = template.get("spec") or {}
    yield from _failure_policy(spec.get("podFailurePolicy"), pod, f"{place}.podFailurePolicy")
    yield from pod_problems(pod, f"{place}.template.spec", needs)


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
        yield from unknown_fields(rule, FIELDS["policy"], f"{here}.")
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


def _agreement(spec: dict, template: dict, metadata: dict, place: str) -> Iterator[str]:
    """What pods agree by must be what the Job says."""
    of_pods, of_job = ((one.get("labels") or {}) for one in (template.get("metadata") or {}, metadata))
    for name in (RUN_LABEL, GENERATION_LABEL):
        if of_pods.get(name) != of_job.get(name):
            ours, theirs = of_pods.get(name), of_job.get(name)
            yield f"{place}.metadata.labels.{name}: {ours}: the job's is {theirs}; make them equal"
    place, generation = f"{place}.spec", of_pods.get(GENERATION_LABEL)
    for container in (template.get("spec") or {}).get("containers") or []:
        given = {one.get("name"): one for one in container.get("env") or []}
        source = (given.get("VIT_POD", {}).get("valueFrom") or {}).get("fieldRef") or {}
        if source.get("fieldPath") != "metadata.uid":
            yield f"{place}: VIT_POD: pods would not be told apart; write a fieldRef of metadata.uid"
        job, start, nodes = (given.get(name, {}).get("value") for name in ("VIT_JOB", "VIT_START", "VIT_NODES"))
        if job != (ours := f"{metadata.get('name')}:{generation}"):
            yield f"{place}: VIT_JOB {job}: is another job; write {ours}"
        if start != generation:
            yield f"{place}: VIT_START {start}: the label {GENERATION_LABEL} is {generation}; make them equal"
        if str(nodes).rpartition("-")[2] != str(spec.get("completions")):
            yield f"{place}: VIT_NODES {nodes}: completions are {spec.get('completions')}; make them equal"
        yield from _directory(container, metadata, place)


def _directory(container: dict, metadata: dict, place: str) -> Iterator[str]:
    """The run whose job it is must be the one that its pods work on."""
    directory, folder = (metadata.get("annotations") or {}).get(DIRECTORY), container.get("workingDir")
    if directory != folder:
        yield f"{place}.workingDir: {folder}: the annotation {DIRECTORY} is {directory}; make them equal"
    words = container.get("command") or []
    if "pipeline.launch" in words and words[words.index("pipeline.launch") + 1 :] != [directory]:
        yield f"{place}.command: {' '.join(words)}: its run is {directory}; write that behind pipeline.launch"


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
    yield from unknown_fields(spec, FIELDS["jobset"], "spec.")
    name = document["metadata"].get("name")
    network = spec.get("network") or {}
    yield from unknown_fields(network, "enableDNSHostnames publishNotReadyAddresses subdomain", "spec.network.")
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
        yield from unknown_fields(job, "name replicas template groupName", f"{place}.")
        inner = (job.get("template") or {}).get("spec") or {}
        yield from _job(inner, f"{place}.template.spec", document["metadata"], needs, restarts_inside=False)
        pod = (inner.get("template") or {}).get("spec") or {}
        host = f"{name}-{job.get('name')}-0-0.{subdomain}"
        yield from _address(pod, host, f"{place}.template.spec.template.spec")
