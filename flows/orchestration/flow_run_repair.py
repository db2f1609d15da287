"""Flow runs whose process is gone: told how their job ended, or handed to a worker while it lives.

A flow's process leaves a note in the home (watchers) until it has said how its runs ended. So only flow runs of this
home are touched, and only those that left a note.
"""

import time
from collections.abc import Callable
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Crashed, State

from cluster.job import JobState
from flows.control.jobs import Conclusion
from flows.orchestration.reporting import state_of, stopped
from flows.orchestration.standing import Standing, standing
from flows.orchestration.watchers import FOLDER, WatcherNote, watcher_notes
from flows.services.api import impatient_client
from pipeline.run_directory import RunDirectory, read_json, write_json

TIMEOUT_SECONDS = 15.0
TELLING_SECONDS = 15.0  # a worker says Crashed twice, up to some seconds apart, whatever was said in between
MOST_STARTS = 20  # of one flow run: one that dies at every start is a person's business
Say = Callable[[str], None]


def repair_flow_runs(home: Path, standings: dict[RunDirectory, Standing], say: Say) -> int:
    """Settle every flow run whose process is gone, and name the jobs that nobody watches; the number of faults."""
    watched: set[Path] = set()
    faults = 0
    with impatient_client(TIMEOUT_SECONDS) as client:
        notes = {note: note.lives() for note in watcher_notes(home)}
        watched |= {run.path.resolve() for note, lives in notes.items() if lives for run in note.runs()}
        for note in (note for note, lives in notes.items() if not lives):
            try:
                watched |= {run.path.resolve() for run in _settled(note, watched, client, say)}
            except Exception as error:  # whatever the API or a cluster raises; the other flow runs are looked at
                faults += 1
                say(f"flow run {note.id}: could not be settled: {error or type(error).__name__}")
    _name_unwatched(home, [run for run in standings if run.path.resolve() not in watched], standings, say)
    return faults


def _name_unwatched(home: Path, runs: list[RunDirectory], standings: dict[RunDirectory, Standing], say: Say) -> None:
    """Name each job that lives and that nobody watches, once: a person may well have left it to itself."""
    memory = home / FOLDER / "unwatched"
    before, named = read_json(memory) or {}, {}
    for run in runs:
        stands = standings[run]
        if not stands.alive or not standing(run).alive:
            continue
        named[str(run.path)] = stands.job.id
        if before.get(str(run.path)) != stands.job.id:
            say(
                f"{run.path.name}: {stands.job.kind} job {stands.job.id.partition(':')[0]} is {stands.state.value} and "
                f"no flow watches it; watch it with: vit resume {run.path}"
            )
    if named != before:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, named)


def _settled(note: WatcherNote, watched: set[Path], client: SyncPrefectClient, say: Say) -> list[RunDirectory]:
    """Settle one flow run whose process is gone; the runs that a worker will watch again. `watched` others watch."""
    runs = note.runs()
    try:
        flow_run = client.read_flow_run(note.id)
    except ObjectNotFound:
        note.remove()
        return []
    kind = flow_run.state_type
    age = time.time() - flow_run.state.timestamp.timestamp()
    if kind in (StateType.SCHEDULED, StateType.PENDING) or (kind == StateType.CRASHED and age < TELLING_SECONDS):
        return runs
    stands = {run: standing(run) for run in runs}
    if any(each.state is JobState.UNKNOWN for each in stands.values()):
        return runs
    alive = [run for run in runs if stands[run].alive]
    if kind in (StateType.CANCELLING, StateType.CANCELLED):
        _carry_out_cancellation(note, flow_run, alive, client, say)
    elif kind in (StateType.COMPLETED, StateType.FAILED):
        note.remove()
    elif alive and all(run.path.resolve() in watched for run in alive):
        words = f"its process is gone, and another flow run watches {_named(alive)}"
        if kind != StateType.CRASHED:
            _tell(client, flow_run, Crashed(message=words), say)
        note.remove()
    elif alive and flow_run.deployment_id is not None and flow_run.run_count < MOST_STARTS:
        words = f"its process is gone and {_named(alive)} lives: to be watched again"
        _tell(client, flow_run, AwaitingRetry(message=words), say)
        return alive
    elif alive:
        if kind != StateType.CRASHED:
            _tell(client, flow_run, Crashed(message=f"its process is gone; the job of {_named(alive)} goes on"), say)
    else:
        _tell_the_end(note, flow_run, stands, client, say)
    return []


def _carry_out_cancellation(
    note: WatcherNote, flow_run: FlowRun, alive: list[RunDirectory], client: SyncPrefectClient, say: Say
) -> None:
    """A person asked for it, and the flow died before it could: stop what was running then, and only that."""
    for run in alive:
        if run.job_file.stat().st_mtime < flow_run.state.timestamp.timestamp():
            say(f"{run.path.name}: its flow run {flow_run.name} was cancelled; {stopped(run)}")
    if flow_run.state_type == StateType.CANCELLING:
        _tell(client, flow_run, Cancelled(message="its process is gone, and so is its job"), say)
    note.remove()


def _tell_the_end(
    note: WatcherNote, flow_run: FlowRun, stands: dict[RunDirectory, Standing], client: SyncPrefectClient, say: Say
) -> None:
    run, ended = next(iter(stands.items()), (None, None))
    if note.single and run is not None and ended.code is not None:
        conclusion = Conclusion(ended.code, ended.reason, run, read_json(run.result_file) or {})
        _tell(client, flow_run, state_of(conclusion), say)
    elif flow_run.state_type != StateType.CRASHED:
        words = "its process is gone; run it again, and what is done stays done"
        _tell(client, flow_run, Crashed(message=words), say)
    note.remove()


def _tell(client: SyncPrefectClient, flow_run: FlowRun, state: State, say: Say) -> None:
    client.set_flow_run_state(flow_run.id, state, force=True)
    say(f"flow run {flow_run.name}: {flow_run.state.name} in Prefect, now {state.name}: {state.message}")


def _named(runs: list[RunDirectory]) -> str:
    return ", ".join(run.path.name for run in runs)
