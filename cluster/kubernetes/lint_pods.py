"""What the pods of a job must say: container, resources, variables, volumes. A part of `lint`."""

import re
from collections.abc import Iterable, Iterator, Sequence

from cluster.kubernetes.lint_fields import FIELDS, WORDS, Needs, is_count, unknown_fields
from cluster.kubernetes.profile import IMAGE, LABEL, QUANTITY, bytes_of
from cluster.kubernetes.security import security_problems
from cluster.secret_forms import is_secret

OPERATORS, EFFECTS = ("Exists", "Equal"), ("NoSchedule", "PreferNoSchedule", "NoExecute")
_OF_KUBERNETES = ("cpu", "memory", "ephemeral-storage")  # and hugepages-SIZE: resources without a domain
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_PASSING = ("emptyDir", "hostPath", "configMap", "secret", "downwardAPI", "projected", "ephemeral")


def pod_problems(pod: dict, place: str, needs: Needs) -> Iterator[str]:
    yield from unknown_fields(pod, FIELDS["pod"], f"{place}.")
    if pod.get("restartPolicy") not in WORDS["restartPolicy"]:
        yield f"{place}.restartPolicy: {pod.get('restartPolicy')}: the Job makes pods again, not the node; write Never"
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if not is_count(grace) or grace < needs.stop_lead_seconds:
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
    if len(containers) != 1:
        said = f"there are {len(containers)}" if containers else "there is none"
        yield f"{place}.containers: {said}; a pod is one supervisor, whose end is the pod's: keep one"
    yield from _affinity(pod.get("affinity") or {}, f"{place}.affinity")
    volumes = pod.get("volumes") or []
    for number, container in enumerate(containers):
        yield from _container(container, volumes, f"{place}.containers[{number}]")
    for volume in volumes:
        if len(volume) != 2:
            yield f"{place}.volumes: {volume.get('name')}: must have a name and one source; write persistentVolumeClaim"
    if needs.on_volume:
        yield from _working_directory(containers, volumes, f"{place}.containers")
    yield from _shared_memory(containers, volumes, place, needs)


def _working_directory(containers: Sequence[dict], volumes: Sequence[dict], place: str) -> Iterator[str]:
    """The run directory must lie on a volume that outlives the pod, and be writable."""
    sources = {volume.get("name"): volume for volume in volumes}
    for number, container in enumerate(containers):
        folder = str(container.get("workingDir", ""))
        mounts = [
            mount
            for mount in container.get("volumeMounts") or []
            if f"{folder}/".startswith(f"{str(mount.get('mountPath')).rstrip('/')}/")
            and mount.get("mountPath") != "/dev/shm"
        ]
        if not mounts:
            yield f"{place}[{number}].workingDir: {folder}: no volume is mounted there, where the run lies; mount it"
            continue
        mount = max(mounts, key=lambda one: len(str(one.get("mountPath"))))
        volume = sources.get(mount.get("name")) or {}
        if mount.get("readOnly") or (volume.get("persistentVolumeClaim") or {}).get("readOnly"):
            yield f"{place}[{number}].volumeMounts: {mount.get('mountPath')}: the run cannot be written; no readOnly"
        for source in set(volume) & set(_PASSING):
            why = "is a pod's or a machine's own, and the run would be lost; name a persistentVolumeClaim"
            yield f"{place}[{number}].volumeMounts: {mount.get('mountPath')}: {source} {why}"


def _affinity(affinity: dict, place: str) -> Iterator[str]:
    yield from unknown_fields(affinity, FIELDS["affinity"], f"{place}.")
    for kind, rules in affinity.items():
        yield from unknown_fields(rules, FIELDS["rules of affinity"], f"{place}.{kind}.")


def _tolerations(tolerations: Iterable[dict], place: str) -> Iterator[str]:
    for number, one in enumerate(tolerations):
        if one.get("operator", "Equal") not in OPERATORS:
            yield f"{place}[{number}].operator: {one['operator']}: unknown; use {' or '.join(OPERATORS)}"
        elif one.get("operator") == "Exists" and one.get("value"):
            yield f"{place}[{number}].value: {one['value']}: Exists takes no value; leave it out, or use Equal"
        if one.get("effect") not in (None, *EFFECTS):
            yield f"{place}[{number}].effect: {one['effect']}: unknown; use {', '.join(EFFECTS)}"


def _container(container: dict, volumes: Sequence[dict], place: str) -> Iterator[str]:
    yield from unknown_fields(container, FIELDS["container"], f"{place}.")
    name = container.get("name")
    if not isinstance(name, str) or not re.fullmatch(LABEL, name):
        yield f"{place}.name: {name}: must be lower-case letters, digits and - (DNS-1123); rename it"
    if not (image := container.get("image")):
        yield f"{place}.image: missing: there is nothing to run; name one (profile.image)"
    elif not isinstance(image, str) or not re.fullmatch(IMAGE, image):
        yield f"{place}.image: {image}: not [REGISTRY/]NAME[:TAG][@DIGEST] in lower case; rename it (profile.image)"
    for probe in _PROBES:
        if probe in container:
            yield f"{place}.{probe}: a run that computes answers nobody, and would be killed; leave it out"
    if "lifecycle" in container:
        yield f"{place}.lifecycle: a hook takes its time from the checkpoint's grace; leave it out"
    for field in ("imagePullPolicy", "terminationMessagePolicy"):
        if field in container and container[field] not in WORDS[field]:
            yield f"{place}.{field}: {container[field]}: unknown; use {', '.join(WORDS[field])}"
    command = container.get("command")
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
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
    yield from unknown_fields(resources, "requests limits claims", f"{place}.")
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for kind, given in (("requests", requests), ("limits", limits)):
        for name, value in given.items():
            if _is_device(name) and "/" not in name:
                yield f"{place}.{kind}.{name}: no such resource; a device's has a domain, such as nvidia.com/gpu"
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
    return name not in _OF_KUBERNETES and not name.startswith("hugepages-")


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
        if isinstance(value := one.get("value"), str) and value and is_secret(name, value):
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
