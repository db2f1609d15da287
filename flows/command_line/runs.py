"""What the command line does with runs that are on disk: carry them out, list, show, stop and resume them.

Everything comes from the run directory and from the place where its profile says that it runs; Prefect is not asked.
"""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.job import CancelError, Job, JobState, Launcher
from cluster.profile import accelerators_here
from flows.control.following import STOP_GRACE_SECONDS, Observation, conclude, newest_job_log
from flows.control.jobs import Conclusion, control, introduce, on_interrupt
from flows.control.submission import attempt_of, launcher_of, runs_here, submit
from flows.home import home_directory
from flows.profiles import changed_profile
from pipeline.budget import hours_of
from pipeline.config.recipe import split_profile_overrides
from pipeline.config.stages import read_run_config
from pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_FAULT, EXIT_STOPPED, FaultError, InputError, near_matches
from pipeline.preparation.preflight import require_ready
from pipeline.preparation.resume import change_run
from pipeline.run_directory import RunDirectory, read_json
from pipeline.supervision.liveness import running_elsewhere
from pipeline.words import number_in_words

Say = Callable[..., None]


def carried_out(run: RunDirectory, home: Path, say: Say, *, watch: bool = False) -> int:
    """Follow the run to its end on this machine; on a cluster submit it and return, unless it is to be watched."""
    if watch or runs_here(run) or run.result_file.is_file():
        return finished(controlled(run, home, say), say)
    require_ready(run, accelerators_here())
    introduce(run, say)
    launcher = launcher_of(run)
    before = read_json(run.job_file) or {}
    job = submit(run, launcher)
    again = "already " if before.get("id") == job.id else ""
    say(f"{again}submitted: {launcher.explain(job) or _job_in_words(job)}")
    say(f"run directory: {run.path}")
    for command, words in (
        (f"vit resume {run.path}", "follow it; Ctrl-C leaves it to itself (so does --watch of this command)"),
        (f"vit logs {run.path}", "what it says"),
        (f"vit stop {run.path}", "stop it with a checkpoint"),
    ):
        say(f"  {command}   # {words}")
    return EXIT_DONE


def controlled(run: RunDirectory, home: Path, say: Say) -> Conclusion:
    """`control` in the foreground, reporting to Prefect where its API answers."""
    with interrupts(runs_here(run)) as (cancelled, detached):
        from flows.orchestration.mirror import mirrored

        def work(observe: Callable[[Observation], None]) -> Conclusion:
            return control(run, home, say, cancelled=cancelled, detached=detached, observe=observe)

        return mirrored(run, home, work, cancelled, say)


@contextlib.contextmanager
def interrupts(here: bool) -> Iterator[tuple[threading.Event, threading.Event]]:
    """What `control` calls `cancelled` and `detached`: Ctrl-C stops a run of this machine, and leaves a cluster's."""
    cancelled, detached = threading.Event(), threading.Event()
    with on_interrupt(cancelled if here else detached, signal.SIGINT, signal.SIGTERM):
        yield cancelled, detached


def finished(conclusion: Conclusion, say: Say) -> int:
    """Say how it ended; the exit code."""
    say(conclusion.message, error=conclusion.code not in (EXIT_DONE, EXIT_STOPPED))
    if conclusion.left:
        say(f"follow it again: vit resume {conclusion.run.path}   stop it: vit stop {conclusion.run.path}")
    elif conclusion.code in (EXIT_STOPPED, EXIT_FAULT) and "vit resume" not in conclusion.message:
        say(f"go on with: vit resume {conclusion.run.path}")
    return conclusion.code


def find_run(name: str, home: Path) -> RunDirectory:
    """A run by path, or by its name under the home."""
    path = Path(name).expanduser()
    if not (path / "config.yaml").is_file() and (home / "runs" / name / "config.yaml").is_file():
        path = home / "runs" / name
    if not (path / "config.yaml").is_file():
        known = [entry.name for entry in (home / "runs").glob("*")]
        raise InputError(f"run `{name}`: no such run directory; {near_matches(name, known)}")
    return RunDirectory(path.absolute())


def runs_command(directory: str | None, say: Say) -> int:
    """List the runs of a home, the oldest first. One that cannot be read is named so, and its neighbours are shown."""
    home, code = home_directory(directory), EXIT_DONE
    for path in sorted((home / "runs").glob("*/config.yaml"), key=lambda entry: entry.stat().st_mtime):
        run = RunDirectory(path.parent)
        try:
            words = _listed(run)
        except (InputError, OSError, ValueError) as error:
            code, words = EXIT_FAILED, f"unreadable {error}"
        say(f"{run.path.name:<48} {words}")
    return code


def _listed(run: RunDirectory) -> str:
    launcher, newest = launcher_of(run), run.newest_checkpoint()
    state = run_state(run, launcher)
    step = f"step {newest.step}" if newest else _without_checkpoint(run)
    hours, best = number_in_words(hours_of(run)), (read_json(run.result_file) or {}).get("best")
    words = f"  best {best['metric']} {best['value']:.4f} at step {best['step']}" if best else ""
    return f"{state:<10} {step:<16} {hours} rank-hours{_place(run, launcher, state)}{words}"


def _without_checkpoint(run: RunDirectory) -> str:
    """How far a run is that has none: a sequence by its runs."""
    if (read_json(run.plan_file) or {}).get("stage") != "sequence":
        return "no checkpoint"
    runs = read_run_config(run.path).runs
    return f"{sum(RunDirectory(path).result_file.is_file() for path in runs)} of {len(runs)} runs"


def _place(run: RunDirectory, launcher: Launcher, state: str) -> str:
    """Where a run of a cluster is, in the cluster's own words."""
    job = launcher.find(run.path) if launcher.kind != "local" and state not in ("done", "new", "stopped") else None
    if job is None:
        return ""
    return f"  {launcher.explain(job) or _job_in_words(job)}"


def run_state(run: RunDirectory, launcher: Launcher) -> str:
    """done, pending, running, stopped, failed, lost, unknown or new: from the run directory and the job alone."""
    if run.result_file.is_file():
        return "done"
    job = launcher.find(run.path)
    if job is None:
        return "new"
    state = launcher.state(job)
    if state is not JobState.ENDED:
        return state.value
    if runs_here(run) and running_elsewhere(run):
        return "running"
    code, _ = conclude(run, job)
    if code in (EXIT_DONE, EXIT_STOPPED):  # a sequence leaves no result of its own, its runs do
        return "done" if code == EXIT_DONE else "stopped"
    number = attempt_of(run, job)
    return "lost" if number is None or run.attempt(number).verdict() is None else "failed"


def logs_command(name: str, directory: str | None, say: Say) -> int:
    run = find_run(name, home_directory(directory))
    launcher = launcher_of(run)
    if not runs_here(run) and (job := launcher.find(run.path)) is not None:
        launcher.log(job, 0)  # what lies elsewhere is fetched
    logs = sorted((run.attempt(run.last_attempt()).path / "log").glob("*.log"))
    written = [log for log in [newest_job_log(run), *logs] if log.is_file() and log.stat().st_size]
    for log in written:
        say(f"==> {log} <==\n{log.read_text(errors='replace').rstrip()}")
    if not written:
        say(f"{run.path.name} has said nothing yet; where it is: vit runs")
    return EXIT_DONE


def stop_command(name: str, directory: str | None, say: Say) -> int:
    run = find_run(name, home_directory(directory))
    launcher = launcher_of(run)
    job = launcher.find(run.path)
    if job is None or launcher.state(job) is JobState.ENDED:
        if runs_here(run) and (where := running_elsewhere(run)):
            raise InputError(f"{run.path}: {where}; stop it there by `vit stop {run.path}`")
        say(f"{run.path.name} is not running")
        return EXIT_DONE
    if not runs_here(run):
        say(f"stopping {_job_in_words(job)} with a checkpoint")
    try:
        launcher.cancel(job, STOP_GRACE_SECONDS)
    except CancelError as error:
        raise FaultError(f"{run.path.name}: {error}") from None
    code, reason = conclude(run, launcher.find(run.path) or job, "" if runs_here(run) else launcher.explain(job))
    say(f"{run.path.name}: {reason}")
    if code == EXIT_STOPPED and "vit resume" not in reason:
        say(f"go on with: vit resume {run.path}")
    return EXIT_DONE if code in (EXIT_DONE, EXIT_STOPPED) else EXIT_FAILED


def resume_command(name: str, overrides: list[str], directory: str | None, say: Say) -> int:
    home = home_directory(directory)
    run = find_run(name, home)
    launcher = launcher_of(run)
    job = launcher.find(run.path)
    lives = job is not None and launcher.state(job) is not JobState.ENDED
    if overrides:
        if lives or run_state(run, launcher) == "running":
            raise InputError(f"{run.path}: is running; stop it first by `vit stop {run.path}`")
        of_recipe, of_profile = split_profile_overrides(overrides)
        profile_text, placement = changed_profile(run.profile_file, of_profile)
        change_run(run, of_recipe, profile_text, placement)
    return carried_out(run, home, say, watch=lives)


def replay_command(name: str, step: int, directory: str | None) -> int:
    run = find_run(name, home_directory(directory))
    return subprocess.run([sys.executable, "-m", "pipeline.replay", str(run.path), str(step)]).returncode


def _job_in_words(job: Job) -> str:
    return f"{job.kind} job {job.id.partition(':')[0]}"
