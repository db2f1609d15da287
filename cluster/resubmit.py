"""Submit a run's job again after it ended: `python -m cluster.resubmit RUN CODE`.

The job script does so itself, at its end; a controller does where the script was killed before. The script that lies in
RUN/submit is submitted as it is. Only the standard library.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from cluster.job import STOP_FILE, Job, Launcher, SubmitError, read_object, submission_lock
from cluster.slurm.commands import NoAnswer
from cluster.slurm.submission import (
    jobs_in_queue,
    living,
    order,
    read_submission,
    recorded_job,
    submit_script,
    write_submission,
)

PATIENCE_SECONDS = 900.0  # of a job that is about to end: a controller that restarts does so within minutes
ASK_AGAIN_SECONDS = 10.0
NOT_AGAIN = "not submitted again"  # how its line begins where it did nothing
STOPPED, FAULT = 75, 76  # the codes of jobs that want to run again; of a fault, if possible elsewhere


def resubmit(run_directory: Path, code: int, launcher: Launcher | None = None, *, patience_seconds: float = 0.0) -> str:
    """Submit the job again where its exit code asks for it, and say in one line what was done, or why not.

    Nothing is submitted where another job of the run lives, where the run was asked to stop, or after more restarts in
    a row without a new checkpoint than the profile allows. Within a job, that job may live: it is about to end.
    Where SLURM does not answer it is asked again for so long as `patience_seconds`.
    """
    if code not in (STOPPED, FAULT):
        return f"{NOT_AGAIN}: exit code {code} does not ask for it"
    if launcher is not None and launcher.kind == "kubernetes":
        return _as_a_job_again(run_directory, code, launcher)
    if launcher is not None and launcher.kind != "slurm":
        return f"{NOT_AGAIN}: a {launcher.kind} job is started by its controller"
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            with submission_lock(run_directory):
                refusal = _refusal(run_directory)
                return f"{NOT_AGAIN}: {refusal}" if refusal else _submit_again(run_directory, code)
        except SubmitError as error:
            return f"{NOT_AGAIN}: {error}"
        except NoAnswer as silence:
            if time.monotonic() >= deadline:
                return f"{NOT_AGAIN}: {silence}"
        time.sleep(ASK_AGAIN_SECONDS)


def restarts_without_progress(run_directory: Path) -> int:
    """Newest attempts in a row whose newest checkpoint is not newer than one before them.

    An attempt that left no verdict was killed: its progress shows in the verdict of a later one.
    """
    best, stale = -1, 0
    for attempt in _attempts(run_directory):
        step = read_object(attempt / "exit" / "verdict.json").get("step")
        if step is not None and step > best:
            best, stale = step, 0
        else:
            stale += 1
    return stale


def _refusal(run_directory: Path) -> str | None:
    submission, recorded, me = read_submission(run_directory), recorded_job(run_directory), _me()
    if not submission:
        return f"{run_directory}/submit/submission.json is missing; nothing was submitted from here"
    if (reason := _stop_or_standstill(run_directory, submission["max_restarts"])) is not None:
        return reason
    if me is not None and recorded is not None and order(recorded.id) > order(me):
        return f"job {recorded.id} has taken over from {me}"
    others = [job.id for job in living(jobs_in_queue(submission)) if job.id != me]
    if others:
        return f"job {others[0]} lives"
    return None


def _stop_or_standstill(run_directory: Path, allowed: int) -> str | None:
    """Why the run itself wants no other job."""
    if (run_directory / STOP_FILE).exists():
        return f"the run was asked to stop by {read_object(run_directory / STOP_FILE).get('by', 'somebody')}"
    if (stale := restarts_without_progress(run_directory)) > allowed:
        return (
            f"{stale} attempts in a row made no new checkpoint, and profile.max_restarts is {allowed}; "
            f"look at {_attempts(run_directory)[-1]}, then: vit resume {run_directory}"
        )
    return None


def _as_a_job_again(run_directory: Path, code: int, launcher: Any) -> str:
    """On Kubernetes a Job makes its pods again itself; this is for one that has used up how often it may."""
    if (reason := _stop_or_standstill(run_directory, launcher.profile.max_restarts)) is not None:
        return f"{NOT_AGAIN}: {reason}"
    node = _named_node(run_directory) if code == FAULT else None
    try:
        job = launcher.submit_again(run_directory, node)
    except SubmitError as error:
        return f"{NOT_AGAIN}: {error}"
    return f"submitted again as job {job.id}{f', without {node}' if node else ''}"


def _submit_again(run_directory: Path, code: int) -> str:
    submission = read_submission(run_directory)
    if code == FAULT and (node := _named_node(run_directory)) is not None:
        submission["avoided"] = [*(one for one in submission["avoided"] if one != node), node]  # the newest is last
        write_submission(run_directory, submission)
    for avoided in _ways_to_avoid(submission["avoided"]):
        try:
            job = _sbatch(run_directory, submission, avoided)
        except SubmitError as error:
            refused = error  # a cluster may be too small to avoid them all
            continue
        without = f", without {', '.join(avoided)}" if avoided else ""
        return f"submitted again as job {job.id}{without}"
    raise refused


def _sbatch(run_directory: Path, submission: dict[str, Any], avoided: list[str]) -> Job:
    """A second job of the run never runs beside the first: singleton waits for all older ones of the name."""
    excluded = [node for node in (submission["exclude"], *avoided) if node]
    options = ["--dependency=singleton"] + ([f"--exclude={','.join(excluded)}"] if excluded else [])
    return submit_script(run_directory, submission, options)


def _ways_to_avoid(nodes: list[str]) -> list[list[str]]:
    """All of them, only the newest, none: in this order until SLURM has enough nodes left."""
    ways = [nodes, nodes[-1:], []]
    return [way for number, way in enumerate(ways) if way not in ways[:number]]


def _named_node(run_directory: Path) -> str | None:
    attempts = _attempts(run_directory)
    return read_object(attempts[-1] / "exit" / "verdict.json").get("node") if attempts else None


def _attempts(run_directory: Path) -> list[Path]:
    """Oldest first."""
    folders = [path for path in (run_directory / "attempts").glob("*") if path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name))


def _me() -> str | None:
    """The id of the SLURM job that this runs in."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def main(run_directory: str, code: str) -> int:
    sys.stdout.write(resubmit(Path(run_directory), int(code), patience_seconds=PATIENCE_SECONDS) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
