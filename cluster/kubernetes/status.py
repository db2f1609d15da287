"""What the API's objects say of a job, in the four states and in words. Pure: from JSON to an answer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.job import JobState

Object = Mapping[str, Any]
_BLAMELESS = ("PodInitializing", "ContainerCreating")


def state_of(job: Object, pods: Sequence[Object] = ()) -> JobState:
    """Of a Job or JobSet. One that is being deleted lives until it is gone; what waits for any pod is PENDING."""
    if ending(job) is not None and not job["metadata"].get("deletionTimestamp"):
        return JobState.ENDED
    status = job.get("status") or {}
    running = any(phase(pod) == "Running" for pod in pods)
    return JobState.RUNNING if running or status.get("ready") else JobState.PENDING


def ending(job: Object) -> Object | None:
    """The condition that ended it; None while it lives."""
    for condition in (job.get("status") or {}).get("conditions") or []:
        if condition.get("type") in ("Complete", "Completed", "Failed") and condition.get("status") == "True":
            return condition
    return None


def in_words(job: Object, pods: Sequence[Object]) -> str:
    """The state with the cluster's own reason, and where its pods run."""
    end = ending(job)
    if end is not None:
        words = end["type"].upper()
        if end["type"] == "Failed":
            reason = ": ".join(part for part in (end.get("reason"), end.get("message")) if part)
            words += f" ({reason})" if reason else ""
            words += "".join(f", {line}" for line in failures(pods)[:1])
        return words
    if job["metadata"].get("deletionTimestamp"):
        return "STOPPING"
    if (job.get("spec") or {}).get("suspend"):
        queue = (job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name")
        return f"PENDING (suspended{f', in the queue {queue}' if queue else ''})"
    alive = [pod for pod in pods if phase(pod) in ("Pending", "Running")]
    machines = sorted({pod["spec"]["nodeName"] for pod in alive if phase(pod) == "Running" and _machine(pod)})
    waits = [line for pod in alive if (line := why_waiting(pod))]
    if machines:
        return f"RUNNING on {', '.join(machines)}" + (f"; {len(waits)} pods wait ({waits[0]})" if waits else "")
    again = failures(pods)
    return f"PENDING ({waits[0] if waits else f'after {again[0]}' if again else 'no pod yet'})"


def phase(pod: Object) -> str:
    return (pod.get("status") or {}).get("phase", "Pending")


def _machine(pod: Object) -> str | None:
    return (pod.get("spec") or {}).get("nodeName")


def why_waiting(pod: Object) -> str | None:
    """The scheduler's reason, or the kubelet's; None where it is about to run, or does."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _one_line(f"{condition.get('reason', 'not scheduled')}: {condition.get('message', '')}")
    for container in status.get("containerStatuses") or []:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") and waiting["reason"] not in _BLAMELESS:
            return _one_line(f"{waiting['reason']}: {waiting.get('message', '')}")
    return None


def failures(pods: Iterable[Object]) -> list[str]:
    """How pods failed, the newest first: exit code, the kubelet's reason, and what they said last."""
    failed = [pod for pod in pods if phase(pod) == "Failed"]
    failed.sort(key=lambda pod: pod["metadata"].get("creationTimestamp", ""), reverse=True)
    lines = []
    for pod in failed:
        status, words = pod["status"], [f"pod {pod['metadata']['name']}"]
        ends = [(one.get("state") or {}).get("terminated") for one in status.get("containerStatuses") or []]
        for end in filter(None, ends):
            reason = end.get("reason")
            words.append(f"exit code {end.get('exitCode')}{f' ({reason})' if reason not in (None, 'Error') else ''}")
            if last := [line for line in (end.get("message") or "").splitlines() if line.strip()]:
                words[-1] += f": {last[-1].strip()[:200]}"
        if status.get("reason"):
            words.append(_one_line(f"{status['reason']}: {status.get('message', '')}"))
        lines.append(" ".join(words))
    return lines


def _one_line(words: str) -> str:
    return " ".join(words.split()).rstrip(": ")[:240]
