"""Repairing what disagrees between Prefect, MLflow, the cluster and the run directories of a home.

The run directory is right, and a place is right about its jobs; the rest is brought to what they say. Done twice it is
as done once, and one line is said for each thing that was done. No job is ever ended but by a cancellation in Prefect.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from flows.control.forwarding import MIRRORED, Forwarder
from flows.home import tracking_uri
from flows.orchestration.standing import RESTART_SECONDS, Standing, at_first_sight, may_restart
from flows.orchestration.watchers import watcher_notes
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.supervision.liveness import lives

Say = Callable[[str], None]


def reconcile_home(home: Path, say: Say) -> int:
    """Repair the records of a home: 0, or 1 where something could not be looked at, which is said."""
    with _alone_in(home) as alone:
        if not alone:
            say(f"another reconciliation is at work in {home}")
            return EXIT_DONE
        runs = [RunDirectory(path.parent) for path in sorted((home / "runs").glob("*/config.yaml"))]
        standings, faults = _standings(runs, say)
        faults += _repair_tracking(home, standings, say)
        faults += _repair_flow_runs(home, standings, say)
    return EXIT_FAILED if faults else EXIT_DONE


def _standings(runs: Sequence[RunDirectory], say: Say) -> tuple[dict[RunDirectory, Standing], int]:
    """How each run stands, and the number of those that cannot be read, which do not keep the others from it.

    All that may be about to start again are given the same moments to do so.
    """
    standings: dict[RunDirectory, Standing] = {}
    faults = 0

    def look(these: Sequence[RunDirectory]) -> None:
        nonlocal faults
        for run in these:
            try:
                run.plan()  # whoever comes later reads it
                _name_working_process(run, say)
                standings[run] = at_first_sight(run)
                _name_moved_job(run, standings[run], say)
            except Exception as error:
                faults += 1
                standings.pop(run, None)
                say(f"{run.path.name}: could not be looked at: {error or type(error).__name__}")

    look(runs)
    if again := [run for run, stands in standings.items() if may_restart(run, stands)]:
        time.sleep(RESTART_SECONDS)
        look(again)
    return standings, faults


def _name_working_process(run: RunDirectory, say: Say) -> None:
    """job.json names another process than the one that works: its submitter died in between."""
    content = read_json(run.job_file)
    if content is None:
        return
    if identity := _working_process(run, content):
        attempt = run.last_attempt()
        write_json(run.job_file, content | {"id": identity, "attempt": attempt})
        say(
            f"{run.path.name}: job.json named no living process; attempt {attempt} runs as {identity.partition(':')[0]}"
        )


def _name_moved_job(run: RunDirectory, stands: Standing, say: Say) -> None:
    """job.json names a job that another has taken over from."""
    content, found = read_json(run.job_file), stands.job
    if content and stands.alive and found.kind == content["kind"] and found.id != content["id"]:
        write_json(run.job_file, content | {"id": found.id})
        say(f"{run.path.name}: job.json named {found.kind} job {content['id']}; it is {found.id} now")


def _working_process(run: RunDirectory, content: dict) -> str | None:
    """Pid and start of the process of this machine that works on the newest attempt, where job.json names none."""
    said = read_json(run.attempt(run.last_attempt()).path / "heartbeat" / "node-000") or {}
    if content.get("kind") not in ("local", "by hand") or said.get("host") != socket.gethostname() or lives(content):
        return None
    with contextlib.suppress(psutil.Error, KeyError):
        process = psutil.Process(said["pid"])
        if process.status() != psutil.STATUS_ZOMBIE and str(run.path.resolve()) in map(_resolved, process.cmdline()):
            return f"{process.pid}:{process.create_time():.2f}"
    return None


def _resolved(argument: str) -> str:
    return os.path.realpath(argument) if argument.startswith("/") else argument


def _repair_tracking(home: Path, standings: dict[RunDirectory, Standing], say: Say) -> int:
    """Ledgers that were not forwarded, and MLflow runs that read RUNNING and have ended; the number of faults."""
    from pipeline.registry.store_file import require_writable_store
    from pipeline.registry.tracking import Mirror, keys_left_running
    from pipeline.registry.versions import require_tracking_server

    uri = tracking_uri(home)
    mirrors = {
        run: Mirror(run, uri, home)
        for run, stands in standings.items()
        if stands.state is not None and run.plan()["stage"] in MIRRORED
    }
    behind = {run for run, mirror in mirrors.items() if mirror.cursor.is_behind()}
    if not behind and not any(mirror.cursor.file.exists() for mirror in mirrors.values()):
        return 0
    try:
        require_tracking_server(uri)
        require_writable_store(uri)
        left_running = keys_left_running(uri)
    except Exception as error:  # MLflow raises whatever its store and its HTTP library raise
        say(f"MLflow was left as it is: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return 1
    watched = {run.path for note in watcher_notes(home) if note.lives() for run in note.runs()}
    faults = 0
    for run, mirror in mirrors.items():
        stands = standings[run]
        if stands.alive and run.path in watched:  # who watches it forwards
            continue
        try:
            if run in behind:
                mirror.forward()
                step = (read_json(mirror.cursor.file) or {}).get("last_step")
                say(f"{run.path.name}: its ledger was forwarded to MLflow, up to step {step}")
            if stands.code is not None and (run in behind or run.key in left_running):
                Forwarder(run, home, say).finish(stands.code, read_json(run.result_file) or {})
                words = {EXIT_DONE: "done", EXIT_STOPPED: "stopped"}.get(stands.code, "failed")
                say(f"{run.path.name}: MLflow held it for running, and it is {words}")
        except Exception as error:
            faults += 1
            say(f"{run.path.name}: could not be mirrored: {str(error).splitlines()[0] if str(error) else error!r}")
    return faults


def _repair_flow_runs(home: Path, standings: dict[RunDirectory, Standing], say: Say) -> int:
    from flows.orchestration.mirror import api_that_answers, use_api

    url = api_that_answers(home)
    if url is None:
        say("no Prefect API answers: its flow runs were left as they are")
        return 0
    use_api(url)
    from flows.orchestration.flow_run_repair import repair_flow_runs

    return repair_flow_runs(home, standings, say)


@contextlib.contextmanager
def _alone_in(home: Path) -> Iterator[bool]:
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".reconcile.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
