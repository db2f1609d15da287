"""What a SLURM profile says: how much of the cluster a job takes, under whose account, in which environment."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cluster.counts import Count, Nodes

Word = Annotated[str, Field(pattern=r"^[^\s\x00-\x1f'\"\\$`#]+$")]  # what may stand bare in an #SBATCH line
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00-\x1f]*$")]

# Options of sbatch that say which job it is, where it runs, how often: it would not be found again, or would run twice.
OURS = (
    "job-name", "comment", "array", "chdir", "export", "nodes", "ntasks", "ntasks-per-node", "test-only", "wait",
    "wrap",
)  # fmt: skip
OURS_IN_SHORT = "JaDNnW"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Image(_Part):
    """A container image that holds this project and everything it needs."""

    kind: Literal["apptainer", "enroot", "pyxis"]
    """What runs it: `apptainer exec`, `enroot start`, or SLURM's own plugin pyxis (`srun --container-image`)."""
    path: Annotated[str, Field(min_length=1)]
    """The image: a .sif or .sqsh file, or what the runtime takes in its place."""
    mounts: list[Annotated[str, Field(pattern=r"^/[^:,\x00-\x1f]*(:/[^:,\x00-\x1f]*)?$")]] = []
    """Folders to show inside, `/path` or `/outside:/inside`. The run directory is always shown; name the datasets'."""
    python: str = "python"
    """The interpreter inside the image."""


class Wheelhouse(_Part):
    """A folder of wheels. Each node makes an environment of them on its own disk, without network, and keeps it."""

    path: AbsolutePath
    """The folder, readable from every node."""
    requirement: str = "vit-pretraining"
    """What to install from it."""
    python: str = "python3"
    """The interpreter on the nodes that makes the environment; 3.11 or 3.12."""
    directory: AbsolutePath = "/tmp"
    """A folder on each node's own disk."""


class SlurmProfile(_Part):
    """A SLURM cluster, submitted to from a login node. Nothing of it needs network on the compute nodes."""

    kind: Literal["slurm"]
    """Where: `slurm` is a SLURM cluster."""
    nodes: Nodes = 1
    """Machines: a number, or a range such as `2-4`: begin with what is there; the global batch and the samples stay."""
    ranks_per_node: Count | None = None
    """Processes per machine, each with one accelerator. None: one per accelerator, or one on CPU nodes."""
    accelerators_per_node: Annotated[int, Field(strict=True, ge=0)] = 8
    """Accelerators per machine, asked for as --gpus-per-node. 0: CPU nodes, or a site that wants them in `gres`."""
    accelerator_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory of one accelerator in GiB, such as 80: what needs more is refused before it waits. None: not checked."""
    loader_workers: Annotated[int, Field(strict=True, ge=0)] | None = None
    """Processes per rank that decode images. None: from cpus_per_task, at most 16; else 8, or 1 on CPU nodes."""
    cpus_per_task: Count | None = None
    """Cores per machine: one task is one machine's supervisor. None: whole machines (--exclusive)."""
    memory: Word | None = None
    """Memory per machine, such as `480G`. None: all of it on whole machines, else what the site gives per core."""
    time: Word = "24:00:00"
    """Time limit of one allocation. The job is asked for a checkpoint before it and submitted again after it."""
    partition: Word | None = None
    """Partition, or several by commas. None: the site's default."""
    account: Word | None = None
    """Account that pays. None: the user's default."""
    qos: Word | None = None
    """Quality of service. None: the default."""
    constraint: Word | None = None
    """Node features, such as `h100&ib`."""
    reservation: Word | None = None
    """Reservation to run in."""
    gres: Word | None = None
    """Generic resources per machine, such as `gpu:h100:8`, for sites that want them so."""
    exclude: Word | None = None
    """Nodes to stay away from. Those that a failed attempt named are added for the attempts after it."""
    dependency: Word | None = None
    """What to wait for, such as `afterok:1234`."""
    directives: list[Annotated[str, Field(pattern=r"^--?[A-Za-z][^\x00-\x1f]*$")]] = []
    """Further options of sbatch, each as it would stand after #SBATCH, such as `--switches=1`."""
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Environment variables of the job (NCCL, InfiniBand), taken literally. They stand in files: no secrets."""
    venv: AbsolutePath | None = None
    """A virtual environment that every node sees. None: the one that submits."""
    modules: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_./+:@=-]+$")]] = []
    """Environment modules to load first, such as `cuda/12.8`."""
    image: Image | None = None
    """A container image to run in."""
    wheelhouse: Wheelhouse | None = None
    """A folder of wheels to make an environment from on each node, without network."""
    cpu_bind: Word = "none"
    """srun's --cpu-bind. `none`: a supervisor and its ranks may use every core of the allocation."""
    threads: Count | None = None
    """OMP_NUM_THREADS of each rank. None: the supervisor divides the machine's cores."""
    umask: Annotated[str, Field(pattern=r"^[0-7]{3,4}$")] | None = None
    """Rights that new files lack, such as '0007' for a group that shares runs. None: the submitter's."""
    preflight: bool = False
    """Look at every node first: same packages, accelerators, clock, run directory, one all-reduce."""
    array_limit: Count | None = None
    """How many runs of a sweep's array run at once. None: as many as SLURM starts."""
    max_restarts: Annotated[int, Field(strict=True, ge=0)] = 3
    """How often in a row an attempt that made no new checkpoint is followed by another."""
    price_per_device_hour: Annotated[float, Field(ge=0)] = 0.0
    """Cost of an hour of one accelerator, or of a machine without; `vit plan` multiplies. 0: unknown."""

    @field_validator("directives")
    @classmethod
    def _leave_ours(cls, directives: list[str]) -> list[str]:
        for directive in directives:
            option = directive.partition("=")[0].partition(" ")[0]
            long = option.startswith("--") and any(ours.startswith(option[2:]) for ours in OURS)  # it may be shortened
            if long or (not option.startswith("--") and option[1] in OURS_IN_SHORT):
                raise ValueError(f"{option} is set by the launcher, which finds the job again by it; leave it out")
        return directives

    @model_validator(mode="after")
    def _one_environment(self) -> "SlurmProfile":
        given = [name for name in ("venv", "image", "wheelhouse") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: a job has one environment; keep one of them")
        return self
