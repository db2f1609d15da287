"""The fields and words that manifests of a job may have, and what a run needs of them."""

import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple

WORDS = {
    "completionMode": ("Indexed",),
    "restartPolicy": ("Never",),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
}
FIELDS = {
    "job": """activeDeadlineSeconds backoffLimit completionMode completions parallelism podFailurePolicy
        podReplacementPolicy suspend template ttlSecondsAfterFinished""",
    "pod": """affinity automountServiceAccountToken containers dnsConfig dnsPolicy enableServiceLinks hostIPC
        hostNetwork hostPID imagePullSecrets initContainers nodeSelector priorityClassName restartPolicy
        runtimeClassName schedulerName securityContext serviceAccountName setHostnameAsFQDN subdomain
        terminationGracePeriodSeconds tolerations topologySpreadConstraints volumes""",
    "container": """args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports readinessProbe
        resources securityContext startupProbe terminationMessagePath terminationMessagePolicy volumeMounts
        workingDir""",
    "affinity": "nodeAffinity podAffinity podAntiAffinity",
    "rules of affinity": """preferredDuringSchedulingIgnoredDuringExecution
        requiredDuringSchedulingIgnoredDuringExecution""",
    "service": "clusterIP ports publishNotReadyAddresses selector type",
    "jobset": "failurePolicy network replicatedJobs startupPolicy successPolicy suspend ttlSecondsAfterFinished",
    "policy": "action onExitCodes onPodConditions",
}


class Needs(NamedTuple):
    """What the run wants of its pods; 0 where nothing is known."""

    stop_lead_seconds: float = 0.0
    shared_memory_bytes: int = 0
    on_volume: bool = True  # False: that the run directory lies on none is told already


NOTHING = Needs()


def unknown_fields(given: dict, fields: str, place: str) -> Iterator[str]:
    known = fields.split()
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            yield f"{place}{name}: unknown field; {f'did you mean {near[0]}?' if near else 'leave it out'}"


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
