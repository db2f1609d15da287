"""What a run directory says of its Kubernetes jobs. Only the standard library.

RUN/submit/ holds what was submitted: job.yaml, kubernetes.json (the request, the job's generation, machines to avoid)
and kubernetes-GENERATION.log, what its pods said. A job has the run's name in the cluster, so there is never more than
one; the generation, a label, tells it from those before. Both are known before it is submitted, and so is its id.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.job import JOB_FILE, Job, JobRequest, read_object, write_object
from cluster.kubernetes.manifest import job_name

KIND = "kubernetes"
MANIFEST = "job.yaml"
SUBMISSION_FILE = "kubernetes.json"


@dataclass(frozen=True)
class Submission:
    """What was last submitted."""

    request: JobRequest
    generation: int
    max_restarts: int
    avoided: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return job_name(self.request.key)


def read_submission(directory: Path) -> Submission | None:
    """None where nothing ever was."""
    said = read_object(directory / "submit" / SUBMISSION_FILE)
    if not said:
        return None
    asked = said["request"]
    request = JobRequest(
        asked["key"], directory, tuple(asked["command"]), asked["environment"], asked["attempt"],
        directory / "submit" / "unused", stop_lead_seconds=asked["stop_lead_seconds"],
        shared_memory_bytes=asked["shared_memory_bytes"], reads=tuple(asked["reads"]),
    )  # fmt: skip
    return Submission(request, said["generation"], said["max_restarts"], tuple(said["avoided"]))


def write_submission(submission: Submission) -> None:
    request = submission.request
    names = ("key", "command", "environment", "attempt", "stop_lead_seconds", "shared_memory_bytes", "reads")
    content = {
        "request": {name: getattr(request, name) for name in names},
        "generation": submission.generation,
        "max_restarts": submission.max_restarts,
        "avoided": submission.avoided,
    }
    write_object(request.directory / "submit" / SUBMISSION_FILE, content)


def next_generation(directory: Path) -> int:
    """One above all of this run's jobs, those of another cluster too: starts are compared by their first number."""
    before = read_submission(directory)
    first = str(read_object(directory / JOB_FILE).get("start", "")).partition(".")[0]
    return 1 + max(before.generation if before else 0, int(first) if first.isdigit() else 0)


def parts_of(id: str) -> tuple[str, str]:
    """Name and generation."""
    name, _, generation = id.partition(":")
    return name, generation


def recorded_job(directory: Path) -> Job | None:
    """The job that job.json names."""
    raw = read_object(directory / JOB_FILE)
    return Job(raw["kind"], raw["id"], raw["key"], raw["attempt"], directory) if raw.get("id") else None


def record_job(directory: Path, key: str, id: str, attempt: int) -> Job:
    """Write job.json. What the job itself wrote there, its start and attempt, stays."""
    before = read_object(directory / JOB_FILE)
    begun = str(before.get("start", "")).partition(".")[0] == parts_of(id)[1] and before.get("id") == id
    kept: dict[str, Any] = {name: before[name] for name in ("start", "host") if begun and name in before}
    content = {"kind": KIND, "id": id, "key": key, "attempt": max(attempt, int(before.get("attempt", 0)))}
    write_object(directory / JOB_FILE, content | kept)
    return Job(**content, directory=directory)
