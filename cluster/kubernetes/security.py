"""What a pod must not be allowed, nor say in the open: what schemas let through and an admission policy may not."""

import re
from collections.abc import Iterator

# A password in a URL; tokens as GitHub, Hugging Face, AWS and others write them; a bearer's header.
SAID_SECRET = re.compile(
    r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@|\b(gh[pousr]_|hf_|glpat-|sk-|AKIA|xox[bp]-)[A-Za-z0-9_-]{8,}"
    r"|[Bb]earer \S{8,}"
)


def security_problems(pod: dict, place: str) -> Iterator[str]:
    """One line for each; `place` is where the pod's spec stands."""
    if pod.get("initContainers"):
        yield f"{place}.initContainers: nothing of a run starts there; leave them out"
    if pod.get("hostNetwork") is True and pod.get("dnsPolicy") != "ClusterFirstWithHostNet":
        why = "with hostNetwork pods find no Service; write ClusterFirstWithHostNet"
        yield f"{place}.dnsPolicy: {pod.get('dnsPolicy')}: {why}"
    for number, container in enumerate(pod.get("containers") or []):
        here = f"{place}.containers[{number}]"
        allowed = container.get("securityContext") or {}
        if allowed.get("runAsUser") == 0 or allowed.get("runAsNonRoot") is False:
            yield f"{here}.securityContext: runs as root; leave the user to the pod's"
        for right in ("privileged", "allowPrivilegeEscalation"):
            if allowed.get(right) is True:
                yield f"{here}.securityContext.{right}: true: more rights than a run needs; leave it out"
        words = [*(container.get("command") or []), *(container.get("args") or [])]
        words += [one.get("value") for one in container.get("env") or []]
        if any(isinstance(word, str) and SAID_SECRET.search(word) for word in words):
            yield f"{here}: a secret must not stand in a manifest; name a Secret in profile.env_from_secret"
