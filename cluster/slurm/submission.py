"""What a run directory and SLURM say together of the run's jobs. Only the standard library: compute nodes run it too.

RUN/submit/ holds what was submitted: job.sbatch, submission.json (the names to look for, nodes to avoid) and the logs.
RUN/job.json is written a moment after sbatch answers; where the submitter died in that moment the job is found by name.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.job import JOB_FILE, Job, JobState, read_object, write_object
from cluster.slurm.commands import NoAnswer, Record, accounted, queue, sbatch

KIND = "slurm"
SCRIPT = "job.sbatch"
SUBMISSION_FILE = "submission.json"


def job_name(key: str) -> str:
    """The name in SLURM: it must stand bare in lists, so other characters than these become `_`."""
    return "vit-" + re.sub(r"[^A-Za-z0-9._-]", "_", key)


def job_comment(directory: Path) -> str:
    """What tells jobs of one name apart: the run directory."""
    return f"run {directory}"


def read_submission(directory: Path) -> dict[str, Any]:
    """What was last submitted; empty where nothing ever was."""
    return read_object(directory / "submit" / SUBMISSION_FILE)


def write_submission(directory: Path, submission: dict[str, Any]) -> None:
    write_object(directory / "submit" / SUBMISSION_FILE, submission)


def recorded_job(directory: Path) -> Job | None:
    """The job that job.json names."""
    raw = read_object(directory / JOB_FILE)
    return Job(raw["kind"], raw["id"], raw["key"], raw["attempt"], directory) if raw.get("id") else None


def record_job(directory: Path, key: str, id: str, attempt: int) -> Job:
    """Write job.json. The attempt never falls: a job that has begun by now has numbered its own."""
    before = read_object(directory / JOB_FILE)
    attempt = max(attempt, int(before.get("attempt", 0)))
    begun = str(before.get("start", "")).partition(".")[0] == id
    kept = {name: before[name] for name in ("start", "host") if begun and name in before}
    content = {"kind": KIND, "id": id, "key": key, "attempt": attempt}
    write_object(directory / JOB_FILE, content | kept)
    return Job(**content, directory=directory)


def jobs_in_queue(submission: dict[str, Any]) -> list[Record]:
    """The run's jobs that slurmctld knows. Or NoAnswer."""
    return _of_the_run(queue(names=_names(submission)), submission)


def jobs_in_accounts(submission: dict[str, Any]) -> list[Record]:
    """The run's jobs that slurmdbd remembers. Or NoAnswer."""
    return _of_the_run(accounted(names=_names(submission), since=submission["since"]), submission)


def living(records: Iterable[Record]) -> list[Record]:
    """Those that have not ended, newest first. A state that we do not know counts as life."""
    return sorted((record for record in records if record.state is not JobState.ENDED), key=order, reverse=True)


def order(record_or_id: Record | str) -> tuple[int, ...]:
    """Newer jobs are greater; of an array the elements by their number."""
    id = record_or_id if isinstance(record_or_id, str) else record_or_id.id
    return tuple(int(part) for part in re.findall(r"\d+", id))


def living_job(directory: Path, submission: dict[str, Any]) -> Job | None:
    """The run's newest living job, written to job.json where it was not yet. Or NoAnswer."""
    if not submission:
        return None
    alive = living(jobs_in_queue(submission))
    if not alive:
        return None
    recorded = recorded_job(directory)
    if recorded is not None and recorded.id == alive[0].id:
        return recorded
    return record_job(directory, submission["key"], alive[0].id, submission["attempt"])


def submit_script(directory: Path, submission: dict[str, Any], options: Sequence[str] = ()) -> Job:
    """Submit the script that lies in the run directory and record its job. The caller holds the lock.

    SubmitError, or NoAnswer.
    """
    script = directory / "submit" / SCRIPT
    id = sbatch_or_find(script, job_name(submission["key"]), submission["comment"], options)
    return record_job(directory, submission["key"], id, submission["attempt"])


def sbatch_or_find(script: Path, name: str, comment: str, options: Sequence[str] = ()) -> str:
    """Submit a script, or find what was submitted where sbatch did not answer: its id. SubmitError, or NoAnswer."""
    before = {record.id for record in queue(names=[name])}
    try:
        return sbatch(script, *options)
    except NoAnswer:
        arrived = [one for one in living(queue(names=[name])) if one.comment == comment and one.id not in before]
        if not arrived:
            raise
        return arrived[0].id.partition("_")[0]


def _names(submission: dict[str, Any]) -> list[str]:
    array = submission["array"]
    return [job_name(submission["key"]), *([array["name"]] if array else [])]


def _of_the_run(records: Iterable[Record], submission: dict[str, Any]) -> list[Record]:
    """Those with the run's own comment, and the run's element of an array; not what sbatch refused, which is FAILED."""
    array = submission["array"]
    element = f"_{array['task']}" if array else None
    return [
        record
        for record in records
        if not (record.state_text == "FAILED" and record.nodes in ("", "None assigned"))
        and (
            (record.name == job_name(submission["key"]) and record.comment == submission["comment"])
            or (element and record.name == array["name"] and record.id.endswith(element))
        )
    ]
