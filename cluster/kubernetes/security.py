"""What a pod must not be allowed, nor say in the open: what schemas let through and an admission policy may not."""

from collections.abc import Iterator
from typing import Any

from cluster.secret_forms import is_open, kind_of_secret, names_a_secret

MAY_BE_ADDED = ("IPC_LOCK",)  # for RDMA
PROFILES = ("RuntimeDefault", "Localhost")
HOSTS = ("hostIPC", "hostPID")


def security_problems(pod: dict, place: str) -> Iterator[str]:
    """One line for each; `place` is where the pod's spec stands."""
    if pod.get("initContainers"):
        yield f"{place}.initContainers: nothing of a run starts there; leave them out"
    if pod.get("hostNetwork") is True and pod.get("dnsPolicy") != "ClusterFirstWithHostNet":
        why = "with hostNetwork pods find no Service; write ClusterFirstWithHostNet"
        yield f"{place}.dnsPolicy: {pod.get('dnsPolicy')}: {why}"
    for name in HOSTS:
        if pod.get(name):
            yield f"{place}.{name}: {pod[name]}: pods would reach into other programs of the machine; leave it out"
    if pod.get("automountServiceAccountToken") is not False:
        yield f"{place}.automountServiceAccountToken: a run asks the API for nothing; write false"
    for volume in pod.get("volumes") or []:
        if "hostPath" in volume:
            yield f"{place}.volumes: {volume.get('name')}: hostPath opens the machine's own files; name a claim"
    security = pod.get("securityContext") or {}
    for number, container in enumerate(pod.get("containers") or []):
        yield from _container(container, security, f"{place}.containers[{number}].securityContext")


def _container(container: dict, of_pod: dict, place: str) -> Iterator[str]:
    allowed = container.get("securityContext") or {}
    if allowed.get("runAsUser") == 0 or allowed.get("runAsNonRoot") is False:
        yield f"{place}: runs as root; leave the user to the pod's"
    if allowed.get("privileged"):
        yield f"{place}.privileged: {allowed['privileged']}: more rights than a run needs; leave it out".replace(
            "True", "true"
        )
    if allowed.get("allowPrivilegeEscalation") is not False:
        yield f"{place}.allowPrivilegeEscalation: must be false; write it"
    capabilities = allowed.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"{place}.capabilities.drop: {capabilities.get('drop')}: a run needs none of them; write [ALL]"
    for name in capabilities.get("add") or []:
        if name not in MAY_BE_ADDED:
            yield f"{place}.capabilities.add: {name}: only {', '.join(MAY_BE_ADDED)} (profile.rdma); take it out"
    profile = allowed.get("seccompProfile", of_pod.get("seccompProfile")) or {}
    if profile.get("type") not in PROFILES:
        yield f"{place}.seccompProfile: {profile.get('type')}: system calls are not held back; write RuntimeDefault"


def secret_problems(document: dict) -> Iterator[str]:
    """A line for each place where a secret stands in the open, in annotations too; none repeats it."""
    for place, text in _texts(document, ""):
        if kind := kind_of_secret(text):
            yield f"{place}: {kind}: a secret must not stand in a manifest; name a Secret in profile.env_from_secret"
    for metadata in _mappings(document, "metadata"):
        for field in ("annotations", "labels"):
            for name, value in (metadata.get(field) or {}).items():
                if "_" in name and names_a_secret(name) and isinstance(value, str) and not is_open(value):
                    yield f"metadata.{field}.{name}: a secret must not stand in a manifest; take it out"


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text with its place; a list of words also as one line, in which an option stands before its value."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for name, below in value.items():
            yield from _texts(below, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list):
        if value and all(isinstance(word, str) for word in value):
            yield place, " ".join(value)
        else:
            for number, below in enumerate(value):
                yield from _texts(below, f"{place}[{number}]")


def _mappings(value: Any, wanted: str) -> Iterator[dict]:
    if isinstance(value, dict):
        for name, below in value.items():
            if name == wanted and isinstance(below, dict):
                yield below
            yield from _mappings(below, wanted)
    elif isinstance(value, list):
        for below in value:
            yield from _mappings(below, wanted)
