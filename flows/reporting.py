"""What the flows share: prepare, control, and a state that says in one line how it ended."""

import json
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.runtime import flow_run as current_flow_run
from prefect.states import Completed, Failed, State

from cluster.local import LocalLauncher
from flows.following import STOP_GRACE_SECONDS
from flows.home import home_directory
from flows.jobs import Conclusion, control
from pipeline.errors import EXIT_DONE, InputError
from pipeline.run_directory import RunDirectory

FLOW_RUN_FILE = "flow_run.json"
CONSOLE: ContextVar[Callable[[str], None] | None] = ContextVar("console", default=None)


def reporter() -> Callable[[str], None]:
    """Where lines go: the flow run's log, and the terminal of a command that runs the flow itself (`CONSOLE`)."""
    logger, console = get_run_logger(), CONSOLE.get()

    def report(line: str) -> None:
        logger.info(line)
        if console is not None:
            console(line)

    return report


def concluded(prepare: Callable[[Path], RunDirectory]) -> State:
    """The final state of a flow that runs one job: Completed with the result's line, or Failed with the reason's."""
    report, home = reporter(), home_directory()
    try:
        run = prepare(home)
    except InputError as error:
        return refused(error)
    conclusion = controlled(run, home, report)
    state = Completed if conclusion.code == EXIT_DONE else Failed
    report(conclusion.message)
    return state(message=conclusion.message, data=str(run.path))


def controlled(run: RunDirectory, home: Path, report: Callable[[str], None]) -> Conclusion:
    """`control`, with a note in the run directory of which flow run watches it, for the cancellation hook."""
    (run.path / FLOW_RUN_FILE).write_text(json.dumps({"id": str(current_flow_run.id)}))
    return control(run, home, report)


def refused(error: InputError) -> State:
    """Wrong input: the same lines as on the command line, and nothing was submitted."""
    for problem in error.problems:
        get_run_logger().error(problem)
    return Failed(message="; ".join(error.problems))


def stop_job(flow: Any, flow_run: Any, state: Any) -> None:
    """Cancellation hook: Prefect ends the flow's process only, so the job is asked to stop with a checkpoint here."""
    launcher = LocalLauncher()
    for note in (home_directory() / "runs").glob(f"*/{FLOW_RUN_FILE}"):
        if json.loads(note.read_text())["id"] == str(flow_run.id):
            job = launcher.find(note.parent)
            if job is not None:
                launcher.cancel(job, STOP_GRACE_SECONDS)
