"""Jobs on Kubernetes: submitted from anywhere that sees the volume, found again by name, stopped with a checkpoint."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cluster.job import (
    JOB_FILE,
    STOP_FILE,
    CancelError,
    Job,
    JobRequest,
    JobState,
    SubmitError,
    person,
    read_from,
    read_object,
    submission_lock,
    write_object,
)
from cluster.kubernetes import status
from cluster.kubernetes.client import Client, NoAnswer, Refused
from cluster.kubernetes.lint import Needs, problems
from cluster.kubernetes.manifest import (
    DIRECTORY,
    GENERATION_LABEL,
    KEY,
    NOBODY_SPECIAL,
    RUN_LABEL,
    job_id,
    job_name,
    manifest_text,
    manifests,
    memory_problem,
)
from cluster.kubernetes.place import hand_over, place_problems, volume_problem
from cluster.kubernetes.pod_logs import PodLogs
from cluster.kubernetes.profile import KubernetesProfile
from cluster.kubernetes.submission import (
    KIND,
    MANIFEST,
    Submission,
    next_generation,
    parts_of,
    read_submission,
    record_job,
    recorded_job,
    write_submission,
)

POLL_SECONDS = 1.0  # between two looks at what is being deleted
GONE_SECONDS = 120.0  # for a job that has ended to be gone once it is deleted
FORCE_SECONDS = 120.0
GONE = "CANCELLED (the job is gone)"  # deleted by somebody, or some days after its end
OURS = "app.kubernetes.io/managed-by=vit"
T = TypeVar("T")


class KubernetesLauncher:
    """The launcher of a Kubernetes profile. A question without an answer is UNKNOWN; only the API says it has ended."""

    kind = KIND

    def __init__(self, profile: KubernetesProfile, client: Client | None = None):
        self.profile, self._client = profile, client

    @property
    def client(self) -> Client:
        """The API server; NoCluster where there is none."""
        if self._client is None:
            self._client = Client(self.profile.context)
        return self._client

    def render(self, request: JobRequest) -> dict[str, str]:
        return {MANIFEST: manifest_text(self._manifests(request, next_generation(request.directory)))}

    def objections(self, request: JobRequest) -> tuple[list[str], list[str]]:
        documents = self._manifests(request, next_generation(request.directory))
        found = self._linted(request, documents)
        if not found:
            try:
                found += self._server_says(documents)
                said = f"checked by {self.client.host}" if not found else ""
            except NoAnswer as silence:  # whoever only looks needs no cluster
                said = f"not checked by a server: {silence}"
            if said:
                sys.stderr.write(f"{MANIFEST}: {said}\n")
        return found, self._out_of_place(request)

    def _out_of_place(self, request: JobRequest) -> list[str]:
        """Why pods could not work there. What root prepared is given to their user."""
        if volume_problem(request.directory, self.profile, "", to_write=True) is None:
            hand_over(request.directory, self._owner())
        return place_problems(request.directory, request.reads, self.profile, self._owner())

    def submit(self, request: JobRequest, avoided: Sequence[str] = ()) -> Job:
        with submission_lock(request.directory):
            try:
                return self._living(request.directory, request.key) or self._submit(request, tuple(avoided))
            except NoAnswer as silence:
                raise SubmitError(f"nothing was submitted: {silence}") from None
            except Refused as refusal:
                raise SubmitError(_in_one_line(refusal)) from None

    def submit_array(self, requests: Sequence[JobRequest], limit: int | None = None) -> list[Job]:
        """A job for each; how many run at once is the queue's to say."""
        return [self.submit(request) for request in requests]

    def submit_again(self, directory: Path, avoid: str | None = None) -> Job:
        """What was submitted last, as a job of its own, away from one more machine. SubmitError."""
        before = read_submission(directory)
        if before is None:
            raise SubmitError(f"{directory}/submit: nothing was submitted from here")
        avoided = [*(one for one in before.avoided if one != avoid), *([avoid] if avoid else [])]
        return self.submit(before.request, avoided)

    def find(self, directory: Path) -> Job | None:
        recorded, submission = recorded_job(directory), read_submission(directory)
        if submission is None and recorded is None and not (directory / "submit").is_dir():
            return None  # nobody has to be asked
        try:
            found = self._of_directory(directory, submission.name if submission is not None else None)
        except (NoAnswer, Refused):
            return recorded
        if found is None:
            return recorded
        id, key = job_id(found["metadata"]["name"], _generation(found)), found["metadata"]["annotations"].get(KEY, "")
        if recorded is not None and recorded.id == id:
            return recorded
        return Job(self.kind, id, key, recorded.attempt if recorded is not None else 0, directory)

    def state(self, job: Job) -> JobState:
        try:
            found = self._object(job)
            if found is None:
                return JobState.ENDED
            pods = self._pods(job) if not (found.get("status") or {}).get("ready") else []
            state = status.state_of(found, pods)
        except (NoAnswer, Refused):
            return JobState.UNKNOWN
        if state is JobState.ENDED:
            self._keep_logs(job)
        return state

    def explain(self, job: Job) -> str:
        name = parts_of(job.id)[0]
        try:
            found = self._object(job)
            words = status.in_words(found, self._pods(job)) if found is not None else GONE
        except (NoAnswer, Refused) as error:
            words = _in_one_line(error) if isinstance(error, Refused) else str(error)
        return f"Kubernetes job {name}: {words}"

    def log(self, job_or_path: Job | Path, offset: int) -> tuple[str, int]:
        if isinstance(job_or_path, Path):
            return read_from(job_or_path, offset)
        self._keep_logs(job_or_path)
        return read_from(self._logs(job_or_path).file, offset)

    def cancel(self, job: Job, grace_seconds: float) -> None:
        directory = job.directory
        assert directory is not None, "a job that a launcher returned knows its run directory"
        try:
            write_object(directory / STOP_FILE, {"time": time.time(), "by": person()})
            self._cancel(job, grace_seconds)
        except PermissionError as error:
            raise CancelError(f"Kubernetes job {job.id}: {error}; its owner can cancel it") from None
        except Refused as refusal:
            (directory / STOP_FILE).unlink(missing_ok=True)  # nobody stops it, so it may be submitted again
            raise CancelError(_in_one_line(refusal)) from None

    def _cancel(self, job: Job, grace_seconds: float) -> None:
        """Delete the job: its pods get SIGTERM and their own grace, and nothing makes them again."""
        started, asked, forced, said = time.monotonic(), False, False, "it lives on"
        while (passed := time.monotonic() - started) <= grace_seconds + FORCE_SECONDS:
            try:
                found = self._object(job)
                if found is None and not (left := self._pods(job)):
                    return
                self._keep_logs(job)
                if found is not None:
                    said = status.in_words(found, left := self._pods(job))
                    if not asked and not found["metadata"].get("deletionTimestamp"):
                        self._delete(found)
                    asked = True
                if passed >= grace_seconds and not forced:
                    forced = True
                    for pod in left:
                        self._delete(pod, {"gracePeriodSeconds": 0})
            except NoAnswer as silence:
                said = str(silence)
            time.sleep(POLL_SECONDS)
        name = parts_of(job.id)[0]
        raise CancelError(
            f"Kubernetes job {name} may not have stopped: {said}; look at: "
            f"kubectl -n {self.profile.namespace} get pods -l {RUN_LABEL}={name}"
        )

    def _submit(self, request: JobRequest, avoided: tuple[str, ...]) -> Job:
        if wrong := self._out_of_place(request):
            raise SubmitError("; ".join(wrong))
        generation = next_generation(request.directory)
        documents = self._manifests(request, generation, avoided)
        if wrong := self._linted(request, documents) or self._server_says(documents):
            raise SubmitError("; ".join(wrong))
        self._remove_finished(request)
        submission = Submission(request, generation, self.profile.max_restarts, avoided)
        id, before = job_id(submission.name, generation), read_object(request.directory / JOB_FILE)
        (request.directory / "submit").mkdir(parents=True, exist_ok=True)
        (request.directory / STOP_FILE).unlink(missing_ok=True)
        (request.directory / "submit" / MANIFEST).write_text(manifest_text(documents))
        write_submission(submission)
        job = record_job(request.directory, request.key, id, request.attempt)
        try:
            self._create(documents, job)
        except Refused as refusal:
            if refusal.status == 409 and (other := self._living(request.directory, request.key)) is not None:
                return other  # somebody else was quicker
            _restore(request.directory, before)
            raise
        return job

    def _create(self, documents: Sequence[dict], job: Job) -> None:
        """The job first: it owns its Service, which goes when it does. NoAnswer, Refused."""
        body = documents[-1]
        try:
            created = self.client.ask("POST", self._jobs(), body)
        except NoAnswer:
            created = self._object(job)  # maybe only the answer was lost
            if created is None:
                raise
        for service in documents[:-1]:
            self._create_service(service, created)

    def _create_service(self, service: dict, job: dict) -> None:
        owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": job["metadata"]["name"]}
        owner |= {"uid": job["metadata"]["uid"], "controller": True}
        body = service | {"metadata": service["metadata"] | {"ownerReferences": [owner]}}
        path = self._core("services")
        for last_try in (False, True):
            try:
                self.client.ask("POST", path, body)
                return
            except Refused as refusal:
                if refusal.status != 409:
                    raise
            there = self._answer_or_none(lambda: self.client.ask("GET", f"{path}/{service['metadata']['name']}"))
            owners = (there or {}).get("metadata", {}).get("ownerReferences") or []
            if there is not None and (last_try or not owners or owner["uid"] in [one["uid"] for one in owners]):
                return
            if there is not None:  # of a job that has just gone, with which it is about to go
                self._answer_or_none(lambda: self.client.ask("DELETE", f"{path}/{service['metadata']['name']}"))

    def _living(self, directory: Path, key: str) -> Job | None:
        """The run's job that has not ended, written to job.json where it was not yet, and its Service made sure of."""
        name = job_name(key)
        found = self._named(name)
        if found is None:
            return None
        whose = _directory(found)
        if whose != str(directory):
            raise SubmitError(f"the job {name} is there and of another run, {whose}; choose another run directory")
        if status.ending(found) is not None or found["metadata"].get("deletionTimestamp"):
            return None
        documents = _submitted(directory)
        if self.profile.backend == "job" and len(documents) == 2:
            self._create_service(documents[0], found)
        id, recorded = job_id(name, _generation(found)), recorded_job(directory)
        return recorded if recorded is not None and recorded.id == id else record_job(directory, key, id, 0)

    def _remove_finished(self, request: JobRequest) -> None:
        """Make room for the name: what stands there has ended, and all it said is in the run directory."""
        name = job_name(request.key)
        deadline = time.monotonic() + GONE_SECONDS
        while (found := self._named(name)) is not None:
            if not found["metadata"].get("deletionTimestamp"):
                if status.ending(found) is None:
                    return  # it has come meanwhile: to create another is refused, and this one is joined
                self._keep_logs(Job(self.kind, job_id(name, _generation(found)), request.key, 0, request.directory))
                self._delete(found)
            if time.monotonic() > deadline:
                raise SubmitError(f"the job {name} has ended and is still being deleted; try again in a while")
            time.sleep(0.2)

    def _linted(self, request: JobRequest, documents: Sequence[dict]) -> list[str]:
        if (wrong := memory_problem(request, self.profile)) is not None:
            return [wrong]
        on_volume = volume_problem(request.directory, self.profile, "", to_write=False) is None
        return problems(documents, Needs(request.stop_lead_seconds, request.shared_memory_bytes, on_volume))

    def _server_says(self, documents: Sequence[dict]) -> list[str]:
        """What the API server would refuse, field by field. NoAnswer; who may not create is told by the submission."""
        found = []
        for document in documents:
            path = self._core("services") if document["kind"] == "Service" else self._jobs()
            try:
                self.client.ask("POST", path, document, dryRun="All", fieldValidation="Strict")
            except Refused as refusal:
                if refusal.status != 409:  # it is there
                    found.append(f"{document['kind']}/{document['metadata']['name']}: {_in_one_line(refusal)}")
        return found

    def _manifests(self, request: JobRequest, generation: int, avoided: Sequence[str] = ()) -> list[dict]:
        return manifests(request, self.profile, generation, self._owner(), avoided)

    def _owner(self) -> tuple[int, int]:
        """User and group of the pods."""
        user = self.profile.user or os.getuid() or NOBODY_SPECIAL
        return user, self.profile.group or os.getgid() or NOBODY_SPECIAL

    def _jobs(self) -> str:
        group = "batch/v1" if self.profile.backend == "job" else "jobset.x-k8s.io/v1alpha2"
        return f"/apis/{group}/namespaces/{self.profile.namespace}/{self.profile.backend}s"

    def _core(self, plural: str) -> str:
        return f"/api/v1/namespaces/{self.profile.namespace}/{plural}"

    def _named(self, name: str) -> dict | None:
        return self._answer_or_none(lambda: self.client.ask("GET", f"{self._jobs()}/{name}"))

    def _of_directory(self, directory: Path, name: str | None) -> dict | None:
        """The job of a run directory: by its name, or among all of ours where it was applied by hand."""
        if name is not None:
            candidates = [self._named(name)]
        else:
            candidates = self.client.ask("GET", self._jobs(), labelSelector=OURS).get("items") or []
        owned = [one for one in candidates if one and _directory(one) == str(directory)]
        return max(owned, key=lambda one: one["metadata"].get("creationTimestamp", ""), default=None)

    def _object(self, job: Job) -> dict | None:
        """The very job, not another of its name."""
        name, generation = parts_of(job.id)
        found = self._named(name)
        return found if found is not None and _generation(found) == generation else None

    def _pods(self, job: Job) -> list[dict]:
        name, generation = parts_of(job.id)
        chosen = f"{RUN_LABEL}={name},{GENERATION_LABEL}={generation}"
        return self.client.ask("GET", self._core("pods"), labelSelector=chosen).get("items") or []

    def _delete(self, found: dict, options: dict[str, Any] | None = None) -> None:
        """In the foreground: an object is gone when all that it owns is. Never another one of the same name."""
        name, kind = found["metadata"]["name"], found.get("kind", "Pod")
        path = self._core("pods") if kind == "Pod" else self._jobs()
        body = {"preconditions": {"uid": found["metadata"]["uid"]}} | (options or {"propagationPolicy": "Foreground"})
        self._answer_or_none(lambda: self.client.ask("DELETE", f"{path}/{name}", body))

    def _answer_or_none(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except Refused as refusal:
            if refusal.status == 404 and refusal.reason in ("NotFound", ""):
                return None
            raise

    def _logs(self, job: Job) -> PodLogs:
        assert job.directory is not None, "a job that a launcher returned knows its run directory"
        file = job.directory / "submit" / f"kubernetes-{parts_of(job.id)[1]}.log"
        return PodLogs(file, self._core("pods"))

    def _keep_logs(self, job: Job) -> None:
        """Copy what the pods have said by now: when they are gone it is gone with them."""
        with contextlib.suppress(NoAnswer, Refused, OSError):  # the ranks' own logs are in the run directory
            self._logs(job).fetch(self.client, self._pods(job))


def _submitted(directory: Path) -> list[dict]:
    try:
        return list(yaml.safe_load_all((directory / "submit" / MANIFEST).read_text()))
    except FileNotFoundError:
        return []


def _restore(directory: Path, before: dict[str, Any]) -> None:
    if before:
        write_object(directory / JOB_FILE, before)
    else:
        (directory / JOB_FILE).unlink(missing_ok=True)


def _directory(found: dict) -> str | None:
    return (found["metadata"].get("annotations") or {}).get(DIRECTORY)


def _generation(found: dict) -> str:
    return (found["metadata"].get("labels") or {}).get(GENERATION_LABEL, "")


def _in_one_line(refusal: Refused) -> str:
    hint = "; ask for that right, as cluster/manifests/rights.yaml gives it" if refusal.status == 403 else ""
    return f"Kubernetes: {refusal}{hint}"
