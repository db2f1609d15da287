"""What the flows share: prepare, control, and a state that says in one line how it ended.

Prefect is told, and never decides: whatever it does, or does not answer, the run goes on.
"""

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.logging.loggers import flow_run_logger
from prefect.states import Cancelled, Completed, Failed, State

from cluster.job import JobState
from flows.control.following import STOP_GRACE_SECONDS
from flows.control.jobs import Conclusion, control
from flows.control.submission import launcher_of
from flows.home import home_directory
from flows.orchestration.artifacts import run_artifacts
from flows.orchestration.events import announce_registration
from flows.orchestration.limits import slot_of
from flows.orchestration.own_state import OwnState, own_state, this_watch
from flows.orchestration.watchers import WatcherNote
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, InputError
from pipeline.redaction import without_secrets
from pipeline.run_directory import RunDirectory

PROGRESS_SECONDS = 15.0  # between two lines of progress in a flow run's log


@dataclass
class Terminal:
    """The terminal of a command that runs a flow itself: where lines go, and what its Ctrl-C and a SIGTERM set.

    `failure` is what the flow ended by, for the command's exit code: a state has only its words.
    """

    say: Callable[[str], None]
    cancelled: threading.Event
    failure: Exception | None = None

    def on_sigterm(self, number: int, frame: object) -> None:
        self.cancelled.set()


TERMINAL: ContextVar[Terminal | None] = ContextVar("terminal", default=None)


def reporter() -> Callable[[str], None]:
    """Where lines go: the flow run's log, and the `TERMINAL` of a command that runs the flow itself.

    Of the lines of progress the log takes one in `PROGRESS_SECONDS`.
    """
    logger, terminal, told_at = get_run_logger(), TERMINAL.get(), -PROGRESS_SECONDS

    def report(line: str) -> None:
        nonlocal told_at
        line = without_secrets(line)
        if terminal is not None:
            terminal.say(line)
        if line.startswith("step "):
            if time.monotonic() - told_at < PROGRESS_SECONDS:
                return
            told_at = time.monotonic()
        logger.info(line)

    return report


def concluded(prepare: Callable[[Path], RunDirectory]) -> State:
    """The final state of a flow that runs one job: Completed with the result's line, or Failed with the reason's.

    A flow run that was begun before, by a process that is gone, goes on with the run that it had then.
    """
    report, home = reporter(), home_directory()
    with own_state(home, single=True) as watch:
        try:
            run = next(iter(watch.note.runs()), None) or prepare(home)
            conclusion = controlled(run, home, report)
        except InputError as error:
            return settled(watch, refused(error))
        report(conclusion.message)
        return settled(watch, state_of(conclusion))


def controlled(
    run: RunDirectory, home: Path, report: Callable[[str], None], *, introduced: bool = False
) -> Conclusion:  # fmt: skip
    """`control`, with artifacts for those who look, and ended with a checkpoint when the flow run is cancelled."""
    watch = this_watch()
    watch.note.add(run)
    with run_artifacts(run, home, watch.flow_run_id) as artifacts, slot_of(run, report, watch.cancelled):
        if watch.cancelled.is_set() and launcher_of(run).find(run.path) is None:
            return Conclusion(EXIT_STOPPED, "cancelled before anything was submitted", run, {})
        conclusion = control(run, home, report, cancelled=watch.cancelled, observe=artifacts.observe,
                             introduced=introduced)  # fmt: skip
    announce_registration(conclusion.result)
    if not artifacts.finish(conclusion):
        watch.untold.append(partial(artifacts.finish, conclusion))
    return conclusion


def state_of(conclusion: Conclusion) -> State:
    """Completed, Cancelled (stopped on request with a checkpoint: nothing is wrong) or Failed."""
    message, data = without_secrets(conclusion.message), str(conclusion.run.path)
    match conclusion.code:
        case code if code == EXIT_DONE:
            return Completed(message=message, data=data)
        case code if code == EXIT_STOPPED:
            return Cancelled(message=f"{message}; go on with: vit resume {data}", data=data)
        case _:
            return Failed(message=message, data=data)


def settled(watch: OwnState, state: State) -> State:
    """`state`, once the API can be told of it; from then on the flow run has nothing left to settle."""
    watch.wait_for_api()
    for tell in watch.untold:
        tell()
    watch.note.remove()
    return state


def refused(error: InputError) -> State:
    """Wrong input: the same lines as on the command line, and nothing was submitted."""
    problems = [without_secrets(problem) for problem in error.problems]
    for problem in problems if TERMINAL.get() is None else ():  # whose command says it
        get_run_logger().error(problem)
    return Failed(message="; ".join(problems))


def stop_job(flow: Any, flow_run: Any, state: Any) -> None:
    """Cancellation hook, in a process of the worker: stops the jobs of a flow that could not do it itself.

    Most often there is nothing left to do. Prefect kills a flow half a minute after the cancellation, and the
    checkpoint of a large model may take longer; or the flow was gone before.
    """
    note, report = WatcherNote(home_directory(), str(flow_run.id)), flow_run_logger(flow_run, flow).info
    for run in note.runs():
        report(f"{run.path.name}: {stopped(run)}")
    note.remove()


def stopped(run: RunDirectory) -> str:
    """Stop the run's job with a checkpoint, wherever it runs, and say in words that it is gone. RuntimeError if not."""
    launcher = launcher_of(run)
    job = launcher.find(run.path)
    if job is None or launcher.state(job) is JobState.ENDED:
        return "nothing of it runs"
    launcher.cancel(job, STOP_GRACE_SECONDS)
    if (found := launcher.state(job)) is not JobState.ENDED:
        raise RuntimeError(f"{run.path}: {job.kind} job {job.id} was asked to stop and is {found.value}")
    return f"{job.kind} job {job.id.partition(':')[0]} was stopped"
