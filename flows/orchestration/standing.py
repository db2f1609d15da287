"""How a run stands: what its directory and the place of its job say together."""

import time
from dataclasses import dataclass

from cluster.job import STOP_FILE, Job, JobState
from flows.control.following import AGAIN, conclude
from flows.control.submission import launcher_of, runs_here
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
    first = at_first_sight(run)
    if not may_restart(run, first):
        return first
    time.sleep(RESTART_SECONDS)
    return at_first_sight(run)


def may_restart(run: RunDirectory, stands: Standing) -> bool:
    """Whether it may be between a job's end and its own restart, where it looks as if it had ended."""
    return stands.code in AGAIN and not runs_here(run) and not (run.path / STOP_FILE).exists()


def at_first_sight(run: RunDirectory) -> Standing:
    """How a run seems to stand: a job that SLURM starts again may look as if it had ended (`may_restart`)."""
    launcher = launcher_of(run)  # a new one: they keep answers for some seconds
    job = launcher.find(run.path)
    if run.result_file.is_file():
        return Standing(job, JobState.ENDED, EXIT_DONE, "done")
    if job is None:
        return Standing(None, None, None, "new")
    state = launcher.state(job)
    if state is JobState.ENDED and runs_here(run) and running_elsewhere(run):
        state = JobState.RUNNING
    if state is not JobState.ENDED:
        return Standing(job, state, None, state.value)
    return Standing(job, state, *conclude(run, job))
