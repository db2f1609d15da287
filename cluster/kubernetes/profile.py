"""What a Kubernetes profile says: how much of a cluster a run takes, from which image, on which volumes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.counts import Count, Nodes

LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
QUANTITY = r"(0|[1-9]\d*)(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?"
_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
# [HOST[:PORT]/]PATH[:TAG][@DIGEST], as container registries spell it: the path has no capitals.
IMAGE = (
    rf"(([A-Za-z0-9][-A-Za-z0-9]*(\.[A-Za-z0-9][-A-Za-z0-9]*)+(:\d+)?|[A-Za-z0-9][-A-Za-z0-9]*:\d+|localhost)/)?"
    rf"{_PART}(/{_PART})*(:\w[\w.-]{{0,127}})?(@[A-Za-z][A-Za-z0-9]*:[0-9a-fA-F]{{32,}})?"
)
Name = Annotated[str, Field(pattern=rf"^{SUBDOMAIN}$", max_length=253)]
Quantity = Annotated[str, Field(pattern=rf"^{QUANTITY}$")]
LabelKey = Annotated[str, Field(pattern=rf"^({SUBDOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$")]
ResourceName = Annotated[str, Field(pattern=rf"^{SUBDOMAIN}/[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$")]
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
AbsolutePath = Annotated[str, Field(pattern=r"^/[^:\x00-\x1f]*$")]

OUR_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/managed-by", "kueue.x-k8s.io/queue-name")
OUR_VARIABLES = (
    "MASTER_ADDR", "MASTER_PORT", "JOB_COMPLETION_INDEX", "VIT_START", "VIT_ATTEMPT", "VIT_POD", "VIT_JOB", "VIT_NODES",
    "VIT_NODE_NAME", "VIT_GATHER_SECONDS",
)  # fmt: skip


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Volume(_Part):
    """A persistent volume claim, shown to every pod at the path where the machine that submits has it too."""

    claim: Name
    """The claim, in the namespace; ReadWriteMany where there is more than one node."""
    path: AbsolutePath
    """Where it lies, in the pods and on the machine that submits alike: runs and datasets name files by this path."""
    subpath: Annotated[str, Field(pattern=r"^[^/\x00-\x1f][^\x00-\x1f]*$")] | None = None
    """The folder of the volume that is shown. None: the whole of it."""
    read_only: bool = False
    """For datasets alone."""


class Toleration(_Part):
    """A taint that the pods bear."""

    key: LabelKey | None = None
    """The taint. None, with operator Exists: every one."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether it must have `value`."""
    value: LabelValue | None = None
    """Its value, with operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect. None: every one."""

    @model_validator(mode="after")
    def _value_belongs_to_equal(self) -> "Toleration":
        if (self.operator == "Equal") != (self.value is not None) or (self.operator == "Equal" and not self.key):
            raise ValueError("operator Equal takes a key and a value, operator Exists takes no value")
        return self


class Rdma(_Part):
    """InfiniBand or RoCE devices, as a device plugin of the cluster offers them."""

    resource: ResourceName = "rdma/hca"
    """The resource's name."""
    count: Count = 1
    """How many of it each pod takes."""


class SecretKey(_Part):
    """One value of a Secret. Its content never enters a file of the run."""

    secret: Name
    """The Secret's name, in the namespace."""
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")]
    """Which of its values."""


class KubernetesProfile(_Part):
    """A Kubernetes cluster (1.27 or newer). A node is a pod: the supervisor of as many ranks as it has accelerators."""

    kind: Literal["kubernetes"]
    """Where: `kubernetes` is a Kubernetes cluster."""
    backend: Literal["job", "jobset"] = "job"
    """`job`: an Indexed Job and a headless Service, on any cluster. `jobset`: a JobSet, where its operator runs."""
    context: str | None = None
    """Context of the kubeconfig. None: the current one; inside a pod, the pod's own account."""
    namespace: Annotated[str, Field(pattern=rf"^{LABEL}$", max_length=63)] = "vit"
    """Namespace of jobs, claims and secrets."""
    nodes: Nodes = 1
    """Pods: a number, or a range such as `2-4`: a start waits `gather_minutes` for all and begins with what came."""
    gather_minutes: Annotated[float, Field(gt=0)] = 60.0
    """How long the pods that are there wait for the others before they give up, or begin with fewer. Of a range in a
    queue they wait 5 minutes at most: Kueue lets in all that will come at once."""
    ranks_per_node: Count | None = None
    """Processes per pod, each with one accelerator. None: one per accelerator, or one on CPU nodes."""
    accelerators_per_node: Annotated[int, Field(strict=True, ge=0)] = 8
    """Accelerators of each pod. 0: CPU nodes."""
    accelerator_resource: ResourceName = "nvidia.com/gpu"
    """The resource by which a device plugin offers them."""
    accelerator_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of one accelerator in GiB, such as 80: what needs more is refused before it waits. None: not checked."""
    loader_workers: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Processes per rank that decode images. None: from `cpus`, at most 16; else 8, or 1 on CPU nodes."""
    cpus: Count | None = None
    """Cores that each pod asks for. None: nothing is asked for."""
    memory: Quantity | None = None
    """Memory of each pod, such as `480Gi`, shared memory included. None: neither asked for nor limited."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, in memory. None: from ranks, micro-batch and workers; less than those need is refused."""
    image: Annotated[str, Field(pattern=rf"^{IMAGE}$")]
    """The container image, [REGISTRY/]NAME[:TAG][@sha256:DIGEST] in lower case, the registry with a dot or a port:
    `cluster/Dockerfile` makes one. Best with a digest or a tag that never moves."""
    python: Annotated[str, Field(min_length=1)] = "python"
    """The interpreter inside the image that has this project."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When nodes pull the image."""
    image_pull_secrets: list[Name] = []
    """Secrets that hold the registry's login."""
    volumes: Annotated[list[Volume], Field(min_length=1)]
    """Claims that pods and the machine that submits both see. The run directory and its datasets lie on them."""
    user: Count | None = None
    """User number of the pods. None: the one who submits, or 1000 where that is root."""
    group: Count | None = None
    """Group number of the pods and of the volumes (fsGroup). None: that of the one who submits, or 1000."""
    service_account: Name | None = None
    """Service account of the pods. They get no token of it: they ask the API for nothing."""
    node_selector: dict[LabelKey, LabelValue] = {}
    """Labels that a node must have."""
    tolerations: list[Toleration] = []
    """Taints that the pods bear."""
    affinity: dict[str, Any] = {}
    """The pods' `affinity`, as Kubernetes spells it. Nodes that an attempt named are kept away from beside it."""
    priority_class: Name | None = None
    """Priority class of the pods."""
    runtime_class: Name | None = None
    """Runtime class, such as `nvidia`, where accelerators need one."""
    queue: Name | None = None
    """Kueue's LocalQueue, which lets all pods in together. None: no Kueue."""
    rdma: Rdma | None = None
    """Network devices for RDMA; adds the capability IPC_LOCK (a runtime must leave memlock unlimited for its users)."""
    host_network: bool = False
    """Use the nodes' own network, where the fabric needs it."""
    labels: dict[LabelKey, LabelValue] = {}
    """Further labels of jobs and pods."""
    annotations: dict[LabelKey, str] = {}
    """Further annotations of jobs and pods."""
    env: dict[Variable, str] = {}
    """Environment variables of the job, taken literally. They stand in files: no secrets."""
    env_from_secret: dict[Variable, SecretKey] = {}
    """Environment variables whose values are those of Secrets."""
    grace_seconds: Count | None = None
    """Between the request to stop and the kill. None: the lead for a checkpoint and half a minute; less is refused."""
    max_restarts: Annotated[int, Field(strict=True, ge=0)] = 3
    """How often a job starts all its pods again after a fault, and how often in a row without a new checkpoint."""
    keep_finished_hours: Count | None = 168
    """How long a job that has ended stays to be looked at. None: until it is deleted."""
    price_per_device_hour: Annotated[float, Field(ge=0)] = 0.0
    """Cost of an hour of one accelerator, or of a machine without; `vit plan` multiplies. 0: unknown."""

    @model_validator(mode="after")
    def _jobset_has_no_range(self) -> "KubernetesProfile":
        if self.backend == "jobset" and "-" in str(self.nodes):
            raise ValueError(
                f"nodes: {self.nodes}: a JobSet starts all its pods or none; write one number, or backend job"
            )
        return self

    @field_validator("labels", "annotations")
    @classmethod
    def _leave_our_labels(cls, given: dict[str, str]) -> dict[str, str]:
        for name in given:
            if name in OUR_LABELS or name.startswith("vit/"):
                raise ValueError(f"{name} is set by the launcher, which finds the job again by it; leave it out")
        return given

    @model_validator(mode="after")
    def _each_variable_once(self) -> "KubernetesProfile":
        for name in [*self.env, *self.env_from_secret]:
            if name in OUR_VARIABLES:
                raise ValueError(f"env: {name} is set by the launcher; leave it out")
            if name in self.env and name in self.env_from_secret:
                raise ValueError(f"env and env_from_secret: {name} stands in both; keep one")
        paths = [volume.path.rstrip("/") or "/" for volume in self.volumes]
        if twice := next((path for path in paths if paths.count(path) > 1 or path in ("/", "/dev/shm")), None):
            raise ValueError(f"volumes: {twice} cannot be mounted, or not twice; give each its own path")
        return self


def bytes_of(quantity: str) -> int:
    """Bytes of a quantity such as `480Gi`."""
    units = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    units |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    number = quantity.rstrip("mkKMGTi")
    return int(float(number) * units[quantity[len(number) :]])
