"""What the lint refuses of a manifest that somebody has edited, beside the faults in test_kubernetes_manifest."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.kubernetes.lint import Needs, problems
from tests.cluster.test_kubernetes_manifest import rendered

NEEDS = Needs(stop_lead_seconds=180.2, shared_memory_bytes=3 << 30)
QUEUE = {"kueue.x-k8s.io/queue-name": "q"}
WEIRD = ("x", 7, ["x"], {"x": {}}, [None])


class Broken:
    """The documents of two nodes, and the parts of the job that tests change."""

    def __init__(self, case: str = "two_nodes") -> None:
        self.documents: list[dict] = copy.deepcopy(rendered(case))
        self.job = self.documents[-1]
        self.spec = self.job["spec"]
        self.template = self.spec["template"]
        self.pod = self.template["spec"]
        self.container = self.pod["containers"][0]
        self.allowed = self.container["securityContext"]
        self.claim = self.container["volumeMounts"][1]

    def variable(self, name: str) -> dict:
        return next(one for one in self.container["env"] if one["name"] == name)

    def resource(self, name: str) -> None:
        for kind in ("requests", "limits"):
            self.container["resources"][kind][name] = "8"

    def volume(self, **source: Any) -> None:
        self.pod["volumes"][1] = {"name": "claim-0"} | source


FAULTS: dict[str, tuple[Callable[[Broken], Any], str]] = {
    "a device without domain": (lambda b: b.resource("gpu"), "limits.gpu: no such resource; a device's has a domain"),
    "a core name misspelt": (lambda b: b.resource("memroy"), "memroy: no such resource"),
    "affinity misspelt": (lambda b: b.pod.update(affinity={"nodAffinity": {}}), "did you mean nodeAffinity?"),
    "a rule of affinity misspelt": (
        lambda b: b.pod.update(affinity={"nodeAffinity": {"requiredDuringScheduling": {}}}),
        "affinity.nodeAffinity.requiredDuringScheduling: unknown field",
    ),
    "a run that cannot be written": (lambda b: b.claim.update(readOnly=True), "the run cannot be written; no readOnly"),
    "a claim that cannot be written": (
        lambda b: b.volume(persistentVolumeClaim={"claimName": "vit", "readOnly": True}), "the run cannot be written",
    ),
    "a run in a pod": (lambda b: b.volume(emptyDir={}), "/vit: emptyDir is a pod's or a machine's own"),
    "a run on a machine": (lambda b: b.volume(hostPath={"path": "/x"}), "/vit: hostPath is a pod's or a machine's own"),
    "a machine's files": (lambda b: b.volume(hostPath={"path": "/x"}), "hostPath opens the machine's own files"),
    "a queue that is not waited for": (
        lambda b: (b.job["metadata"].update(labels=QUEUE), b.spec.update(suspend=False)), "spec.suspend: False: the qu",
    ),
    "nobody lets it go": (lambda b: b.spec.update(suspend=True), "without the label kueue.x-k8s.io/queue-name nothing"),
    "pods of another generation": (
        lambda b: b.template.update(metadata={"labels": b.template["metadata"]["labels"] | {"vit/generation": "9"}}),
        "template.metadata.labels.vit/generation: 9: the job's is 7",
    ),
    "pods of another job": (lambda b: b.variable("VIT_JOB").update(value="vit-x:7"), "VIT_JOB vit-x:7: is another job"),
    "nothing to run": (lambda b: b.container.update(command=[]), "command: []: must be a list of words"),
    "another run": (
        lambda b: b.container.update(command=["python", "-m", "pipeline.launch", "/vit/runs/x"]),
        "its run is /vit/runs/mae; write that behind pipeline.launch",
    ),
    "no run": (lambda b: b.container.update(command=["python", "-m", "pipeline.launch"]), "its run is /vit/runs/mae"),
    "another folder": (lambda b: b.container.update(workingDir="/vit/x"), "the annotation vit/directory is /vit/"),
    "an image in capitals": (lambda b: b.container.update(image="Vit:1"), "image: Vit:1: not [REGISTRY/]NAME"),
    "a second container": (
        lambda b: b.pod["containers"].append(b.container | {"name": "b"}), "there are 2; a pod is one supervisor",
    ),
    "a probe": (lambda b: b.container.update(livenessProbe={"exec": {}}), "livenessProbe: a run that computes answers"),
    "a hook": (
        lambda b: b.container.update(lifecycle={"preStop": {"sleep": {"seconds": 999}}}), "lifecycle: a hook takes its",
    ),
    "a capability": (
        lambda b: b.allowed.update(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
        "capabilities.add: SYS_ADMIN: only IPC_LOCK",
    ),
    "no capabilities": (lambda b: b.allowed.pop("capabilities"), "capabilities.drop: None: a run needs none of them"),
    "escalation unsaid": (lambda b: b.allowed.pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation: must be fal"),
    "no profile": (lambda b: b.pod["securityContext"].pop("seccompProfile"), "seccompProfile: None: system calls are"),
    "unconfined": (
        lambda b: b.allowed.update(seccompProfile={"type": "Unconfined"}), "seccompProfile: Unconfined: system calls",
    ),
    "host's IPC": (lambda b: b.pod.update(hostIPC=True), "hostIPC: True: pods would reach into other programs"),
    "host's processes": (lambda b: b.pod.update(hostPID=True), "hostPID: True: pods would reach into other programs"),
    "a token of the account": (
        lambda b: b.pod.update(automountServiceAccountToken=True), "automountServiceAccountToken: a run asks the API",
    ),
    "a token by default": (lambda b: b.pod.pop("automountServiceAccountToken"), "automountServiceAccountToken: a run"),
    "a secret in an annotation": (
        lambda b: b.job["metadata"]["annotations"].update(note="postgresql://u:p@ss@h/db"), "metadata.annotations.note",
    ),
    "a secret by its annotation's name": (
        lambda b: b.job["metadata"]["annotations"].update(DB_PASSWORD="abc"), "DB_PASSWORD: a secret must not stand",
    ),
    "a secret behind an option": (
        lambda b: b.container.update(args=["--password", "hunter2hunter2"]), "args: a password or token in words",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_manifest_that_was_edited_wrongly_is_refused_by_name_in_one_line(fault):
    change, said = FAULTS[fault]
    change(broken := Broken())
    found = problems(broken.documents, NEEDS)
    assert any(said in line for line in found), found
    assert all("\n" not in line and "p@ss" not in line and "hunter2" not in line for line in found)


def test_a_switch_and_paths_to_secrets_are_no_secrets_and_rdma_may_lock_memory():
    broken = Broken()
    broken.allowed["capabilities"]["add"] = ["IPC_LOCK"]
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"), ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/vit/key.json"), ("HF_TOKEN_PATH", "/vit/token"),
    ):  # fmt: skip
        broken.container["env"].append({"name": name, "value": value})
    assert problems(broken.documents, NEEDS) == []


@pytest.mark.parametrize("case", ["everything", "jobset"])
def test_whatever_stands_in_a_field_is_answered_in_lines_and_never_by_an_exception(case):
    for number in range(len(rendered(case))):
        for path in _paths(rendered(case)[number]):
            for value in WEIRD:
                documents = copy.deepcopy(rendered(case))
                place: Any = documents[number]
                for step in path[:-1]:
                    place = place[step]
                place[path[-1]] = value
                assert all("\n" not in line for line in problems(documents, NEEDS))


def test_what_is_no_manifest_at_all_is_said():
    for documents in ([{"kind": ["Job"]}], [{"kind": "Job"}], [{"kind": "Job", "metadata": "x"}], [None], ["x"], [[]]):
        assert any("nothing would run" in line or "Job/?" in line for line in problems(documents))


def _paths(value: Any, here: tuple = ()) -> Iterator[tuple]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in below:
        yield (*here, name)
        yield from _paths(one, (*here, name))
