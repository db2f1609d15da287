"""How a run stands: what its directory and the place of its job say together."""

import time
from dataclasses import dataclass

from cluster.job import Job, JobState
from flows.control.jobs import conclude, launcher_of
from flows.control.submission import runs_here
from pipeline.errors import EXIT_DONE
from pipeline.run_directory import RunDirectory
from pipeline.supervision.liveness import running_elsewhere

RESTART_SECONDS = 2.0


@dataclass(frozen=True)
class Standing:
    """What a run directory and the place of its job say together."""

    job: Job | None
    state: JobState | None  # None: nothing was ever submitted
    code: int | None  # of the contract, where it has ended
    reason: str

    @property
    def alive(self) -> bool:
        return self.state in (JobState.PENDING, JobState.RUNNING)


def standing(run: RunDirectory) -> Standing:
    """How a run stands; of a job whose place does not answer nothing is concluded."""
    launcher = launcher_of(run)
    job = launcher.find(run.path)
    if run.result_file.is_file():
        return Standing(job, JobState.ENDED, EXIT_DONE, "done")
    if job is None:
        return Standing(None, None, None, "new")
    state = launcher.state(job)
    if state is JobState.ENDED and runs_here(run) and running_elsewhere(run):
        state = JobState.RUNNING
    if state is JobState.ENDED and not runs_here(run):  # between a job's end and its own restart it may look so
        time.sleep(RESTART_SECONDS)
        job = launcher.find(run.path)
        state = launcher.state(job)
    if state is not JobState.ENDED:
        return Standing(job, state, None, state.value)
    return Standing(job, state, *conclude(run, job))
