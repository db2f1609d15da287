"""Jobs on SLURM: submitted from a login node, found again by name and comment, stopped with a checkpoint."""

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.job import (
    STOP_FILE,
    CancelError,
    Job,
    JobRequest,
    JobState,
    SubmitError,
    person,
    read_from,
    submission_lock,
    write_object,
)
from cluster.slurm.commands import NoAnswer, Record, accounted, queue, scancel
from cluster.slurm.profile import SlurmProfile
from cluster.slurm.script import array_script, sbatch_script
from cluster.slurm.submission import (
    KIND,
    SCRIPT,
    job_comment,
    job_name,
    jobs_in_accounts,
    jobs_in_queue,
    living,
    living_job,
    order,
    read_submission,
    record_job,
    recorded_job,
    sbatch_or_find,
    submit_script,
    write_submission,
)

ARRAY_SCRIPT = "array.sbatch"
CANCEL_POLL_SECONDS = 1.0
ASK_AGAIN_SECONDS = 20.0  # a job that is just starting ignores the first request
FORCE_SECONDS = 180.0  # KillWait is 30 s by default, and sites raise it
SHARED_SECONDS = 1.0  # so old may an answer be that the runs of an array share

_array_lock = threading.Lock()
_of_arrays: dict[str, tuple[float, list[Record]]] = {}  # by array: when slurmctld was asked, and what it said


class SlurmLauncher:
    """The launcher of a SLURM profile. A poll that fails is UNKNOWN; only slurmctld says that a job has ended.

    slurmctld is asked for a job's state at most every `poll_seconds`, however often a caller asks: it serves everybody.
    """

    kind = KIND

    def __init__(self, profile: SlurmProfile, python: str = sys.executable, poll_seconds: float = 5.0):
        self.profile, self.python, self.poll_seconds = profile, python, poll_seconds
        self._states: dict[str, tuple[float, JobState]] = {}

    def render(self, request: JobRequest) -> dict[str, str]:
        return {SCRIPT: sbatch_script(request, self.profile, self.python)}

    def objections(self, request: JobRequest) -> tuple[list[str], list[str]]:
        return [], []

    def submit(self, request: JobRequest) -> Job:
        with submission_lock(request.directory), _silence_refuses():
            existing = living_job(request.directory, read_submission(request.directory))
            if existing is not None:
                return existing
            _require_environment(self.profile)
            return submit_script(request.directory, self._prepare(request))

    def submit_array(self, requests: Sequence[JobRequest], limit: int | None = None) -> list[Job]:
        """One sbatch for many runs, `limit` of them at a time; one job for each request, in their order.

        Runs that have a living job keep it and stay out of the array.
        """
        with contextlib.ExitStack() as locks, _silence_refuses():
            for request in sorted(requests, key=lambda request: str(request.directory)):
                locks.enter_context(submission_lock(request.directory))
            jobs = {
                request.key: living_job(request.directory, read_submission(request.directory)) for request in requests
            }
            new = [request for request in requests if jobs[request.key] is None]
            jobs |= self._submit_array(new, limit or self.profile.array_limit) if new else {}
        return [jobs[request.key] for request in requests]

    def _submit_array(self, requests: list[JobRequest], limit: int | None) -> dict[str, Job]:
        _require_environment(self.profile)
        digest = hashlib.sha256("\n".join(request.key for request in requests).encode()).hexdigest()[:12]
        name, comment = job_name(f"array-{digest}"), job_comment(requests[0].directory)
        for task, request in enumerate(requests):
            self._prepare(request, array={"name": name, "task": task})
        script = requests[0].directory / "submit" / ARRAY_SCRIPT
        script.write_text(array_script(name, comment, requests, self.profile, limit))
        id = sbatch_or_find(script, name, comment)
        return {
            request.key: record_job(request.directory, request.key, f"{id}_{task}", request.attempt)
            for task, request in enumerate(requests)
        }

    def _prepare(self, request: JobRequest, array: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write everything that a look-up by name, or a submission from the compute node, needs: submission.json."""
        (request.directory / "submit").mkdir(parents=True, exist_ok=True)
        (request.directory / STOP_FILE).unlink(missing_ok=True)
        before = read_submission(request.directory)
        submission = {
            "key": request.key,
            "comment": job_comment(request.directory),
            "array": array,
            "attempt": request.attempt,
            "since": before.get("since", time.time()),
            "max_restarts": self.profile.max_restarts,
            "exclude": self.profile.exclude,
            "avoided": [],  # whoever submits by hand has looked at the nodes, or wants them tried again
        }
        write_submission(request.directory, submission)
        for name, text in self.render(request).items():
            (request.directory / "submit" / name).write_text(text)
        return submission

    def find(self, directory: Path) -> Job | None:
        recorded, submission = recorded_job(directory), read_submission(directory)
        if not submission:
            return recorded
        found: list[Record] = []
        with contextlib.suppress(NoAnswer):
            found += jobs_in_queue(submission)
        if not living(found):
            with contextlib.suppress(NoAnswer):
                found += jobs_in_accounts(submission)
        newest = max(found, key=order, default=None)
        if newest is None or (recorded is not None and order(recorded.id) >= order(newest)):
            return recorded
        attempt = recorded.attempt if recorded is not None else submission["attempt"]
        return Job(self.kind, newest.id, submission["key"], attempt, directory)

    def state(self, job: Job) -> JobState:
        asked, state = self._states.get(job.id, (-self.poll_seconds, JobState.UNKNOWN))
        if time.monotonic() - asked >= self.poll_seconds:
            try:
                records = _in_queue(job.id)
                # one that slurmctld does not know any more has ended, whatever slurmdbd has heard so far
                state = records[0].state if records else JobState.ENDED
            except NoAnswer:
                state = JobState.UNKNOWN
            self._states[job.id] = (time.monotonic(), state)
        return state

    def explain(self, job: Job) -> str:
        try:
            records = _in_queue(job.id)
        except NoAnswer as silence:
            return f"SLURM job {job.id}: {silence}"
        with contextlib.suppress(NoAnswer):
            if not records or records[0].state is JobState.ENDED:
                records = accounted(job=job.id) or records
        return f"SLURM job {job.id}: {_in_words(records[0])}" if records else ""

    def log(self, job_or_path: Job | Path, offset: int) -> tuple[str, int]:
        if isinstance(job_or_path, Path):
            return read_from(job_or_path, offset)
        assert job_or_path.directory is not None, "a job that a launcher returned knows its run directory"
        return read_from(job_or_path.directory / "submit" / f"slurm-{job_or_path.id}.out", offset)

    def cancel(self, job: Job, grace_seconds: float) -> None:
        directory = job.directory
        assert directory is not None, "a job that a launcher returned knows its run directory"
        try:
            write_object(directory / STOP_FILE, {"time": time.time(), "by": person()})
            self._cancel(directory, job, grace_seconds)
        except PermissionError as error:
            raise CancelError(f"SLURM job {job.id}: {error}; its owner can cancel it") from None

    def _cancel(self, directory: Path, job: Job, grace_seconds: float) -> None:
        started, last_word, said = time.monotonic(), -ASK_AGAIN_SECONDS, "it lives on"
        while (passed := time.monotonic() - started) <= grace_seconds + FORCE_SECONDS:
            force = passed >= grace_seconds
            try:
                alive = _alive(directory, job)
                if not alive:
                    self._states.pop(job.id, None)
                    _of_arrays.pop(job.id.partition("_")[0], None)
                    return
                said = f"it lives on, {_in_words(alive[0])}"
                if passed - last_word >= ASK_AGAIN_SECONDS or (force and last_word < grace_seconds):
                    last_word = passed
                    for record in alive:
                        _ask_or_end(record, force)
            except NoAnswer as silence:
                said = str(silence)
            except PermissionError:
                (directory / STOP_FILE).unlink(missing_ok=True)  # nobody stops it, so it may be submitted again
                raise
            time.sleep(CANCEL_POLL_SECONDS)
        raise CancelError(f"SLURM job {job.id} may not have stopped: {said}; look at: squeue -j {job.id}")


def _require_environment(profile: SlurmProfile) -> None:
    """SubmitError where what every node must see is not even here: the job would wait for its turn and then fail."""
    needed = {
        "venv": profile.venv and f"{profile.venv}/bin/python",
        "wheelhouse.path": profile.wheelhouse and profile.wheelhouse.path,
    }
    for name, path in needed.items():
        if path and not os.path.exists(path):
            raise SubmitError(f"profile.{name}: {path} does not exist here, and every node must see it")


@contextlib.contextmanager
def _silence_refuses() -> Iterator[None]:
    """Where SLURM does not answer, a person is told that nothing was submitted; a later look-up finds what was."""
    try:
        yield
    except NoAnswer as silence:
        raise SubmitError(f"nothing was submitted: {silence}") from None


def _in_queue(id: str) -> list[Record]:
    """What slurmctld knows of a job. Of an array's elements many are followed side by side: they ask it together."""
    array, _, task = id.partition("_")
    if not task:
        return queue(job=id)
    with _array_lock:
        asked, records = _of_arrays.get(array, (-SHARED_SECONDS, []))
        if time.monotonic() - asked >= SHARED_SECONDS:
            records = queue(job=array)
            _of_arrays[array] = (time.monotonic(), records)
    return [record for record in records if record.id == id]


def _alive(directory: Path, job: Job) -> list[Record]:
    """The job itself, and every other of the run: one may have been submitted while this one was asked to stop."""
    records = {record.id: record for record in queue(job=job.id)}
    if submission := read_submission(directory):
        records |= {record.id: record for record in jobs_in_queue(submission)}
    return living(records.values())


def _in_words(record: Record) -> str:
    words = [record.state_text]
    if record.reason not in ("", "None"):
        words[0] += f" ({record.reason})"
    if record.nodes and record.nodes != "None assigned":
        words.append(f"on {record.nodes}")
    if record.elapsed and record.state is not JobState.PENDING:
        words.append(f"after {record.elapsed}" if record.state is JobState.ENDED else f"for {record.elapsed}")
    if record.exit_code:
        words.append(f"exit code {record.exit_code}")
    return ", ".join(words)


def _ask_or_end(job: Record, force: bool) -> None:
    """What waits, or has used its grace, is cancelled; what runs is asked for a checkpoint."""
    if force or job.state is not JobState.RUNNING:
        scancel(job.id)
    elif job.state_text == "RUNNING":
        scancel(job.id, "--signal=USR1")
