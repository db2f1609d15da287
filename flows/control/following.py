"""Following a run's jobs to the end of the last one: through restarts, new job ids and spells without an answer."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cluster.job import Job, JobState, Launcher
from cluster.resubmit import NOT_AGAIN, resubmit
from flows.control.progress import LINE_SECONDS, LedgerTail
from flows.control.submission import LOCAL, attempt_of, runs_here, submit
from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED
from pipeline.run_directory import RunDirectory, read_json
from pipeline.verdict import concluded

LOOK_SECONDS = 0.3  # between two looks at the run directory
STATE_SECONDS, STATE_SECONDS_LATER, SOON_SECONDS = 2.0, 10.0, 120.0  # between two questions to a cluster
CLUSTER_LINE_SECONDS = 15.0
CONFIRM_SECONDS = 6.0  # longer than a launcher keeps an answer
OBSERVE_SECONDS = 2.0
CANCEL_AGAIN_SECONDS = 10.0
AGAIN = (EXIT_STOPPED, EXIT_FAULT)  # codes of jobs that want to run again
CANCELLED = "CANCELLED"  # in a cluster's own words
JOB_LOGS = ("slurm-*.out", "kubernetes-*.log")  # what a job's script, or its pods, said
STOP_GRACE_SECONDS = 600.0  # a checkpoint of a large model takes minutes


class Observation(NamedTuple):
    """What is seen of a followed run: `step` is the newest of `last_step`, `entry` its ledger line ({} before it)."""

    job: Job
    state: JobState
    step: int
    last_step: int
    entry: dict[str, Any]


def ignore(observation: Observation) -> None:
    """An observer that is not interested."""


class Follower:
    """Follows one run, and stops it when `cancelled` is set. Once `detached` is set it leaves the job to itself."""

    def __init__(
        self, run: RunDirectory, launcher: Launcher, report: Callable[[str], None], *, cancelled: threading.Event,
        detached: threading.Event, observe: Callable[[Observation], None] = ignore,
    ):  # fmt: skip
        self.run, self.launcher, self.report, self.observe = run, launcher, report, observe
        self.cancelled, self.detached, self.has_left = cancelled, detached, False
        self.here = runs_here(run)
        self._observed_at, self._cancelling = 0.0, set[str]()

    def follow(self) -> tuple[int, str]:
        """Submit or attach, and follow to the end: exit code and reason. `has_left` says that it was left instead."""
        job = self._living() or submit(self.run, self.launcher)
        while True:
            attempt = self._watch(job)
            if self.has_left:
                return EXIT_DONE, f"goes on as {_in_words(job)}"
            if attempt is not None and not self.here:
                concluded(self.run, self.run.attempt(attempt))  # unless the script has: it may have been killed before
            code, reason = conclude(self.run, job, self._words(job), attempt=attempt)
            successor = self._successor(job, code, attempt)
            if successor is None:
                return code, reason
            self.report(f"{reason}; going on")
            job = successor

    def _living(self) -> Job | None:
        """The job to attach to: one that has not ended, also where the cluster does not answer."""
        job = None if self.here else self.launcher.find(self.run.path)
        return job if job is not None and self.launcher.state(job) is not JobState.ENDED else None

    def _watch(self, job: Job) -> int | None:
        """Until the job has ended, or is left; the newest attempt that it made."""
        states = _States(self.launcher, job, self.here, lambda: self._has_concluded(job))
        told = _Told(self.report, self.launcher, job)
        tail, attempt = None, None
        while (state := states.now()) is not JobState.ENDED:
            if self.detached.is_set():
                self.has_left = True
                return attempt
            if (newest := attempt_of(self.run, job)) is not None and newest != attempt:
                attempt = newest
                self._close(tail)
                tail = LedgerTail(self.run, attempt, LINE_SECONDS if self.here else CLUSTER_LINE_SECONDS)
                self.report(f"{self.run.path.name}: attempt {attempt} runs as {_in_words(job)}; {self.run.path}")
            told.state(state)
            for line in tail.lines() if tail is not None and state is not JobState.PENDING else ():
                self.report(line)
            self._observe(job, state, tail)
            self._cancel_if_asked(job)
            time.sleep(LOOK_SECONDS)
        self._close(tail)  # it reads to the end, which is then observed
        self._observe(job, JobState.ENDED, tail, at_once=True)
        newest = attempt_of(self.run, job)  # None once a successor has written its own job.json
        return attempt if newest is None else newest

    def _has_concluded(self, job: Job) -> bool:
        """Whether the job's script came to its verdict, or has submitted another job since."""
        number = attempt_of(self.run, job)
        if number is None:
            return str((read_json(self.run.job_file) or {}).get("id")) != job.id
        return (self.run.attempt(number).path / "exit" / "verdict.json").is_file()

    def _close(self, tail: LedgerTail | None) -> None:
        for line in tail.lines(last=True) if tail is not None else ():
            self.report(line)

    def _observe(self, job: Job, state: JobState, tail: LedgerTail | None, *, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self._observed_at < OBSERVE_SECONDS:
            return
        self._observed_at = time.monotonic()
        entry = tail.latest if tail is not None else {}
        last_step = tail.last_step if tail is not None else 0
        try:
            self.observe(Observation(job, state, int(entry.get("step", 0)), last_step, entry))
        except Exception as error:  # who looks on may not end a run
            self.observe = ignore
            self.report(f"progress is no longer shown elsewhere: {error or type(error).__name__}")

    def _cancel_if_asked(self, job: Job) -> None:
        if self.cancelled.is_set() and job.id not in self._cancelling:
            self._cancelling.add(job.id)
            self.report("stopping")
            threading.Thread(target=self._cancel, args=(job,), daemon=True).start()

    def _cancel(self, job: Job) -> None:
        """Until it is confirmed: a cluster that does not answer is asked again."""
        while True:
            try:
                self.launcher.cancel(job, STOP_GRACE_SECONDS)
                return
            except Exception as error:  # whatever the place says; nobody else is there to ask again
                self.report(f"not stopped yet, asking again: {error or type(error).__name__}")
                time.sleep(CANCEL_AGAIN_SECONDS)

    def _successor(self, job: Job, code: int, attempt: int | None) -> Job | None:
        """The job that goes on with the run after this one; None where its end is the run's."""
        if self.here:
            stops_as_planned = bool(self.run.plan().get("rehearsal")) and code == EXIT_STOPPED
            return submit(self.run, self.launcher) if stops_as_planned and not self.cancelled.is_set() else None
        newest = self.launcher.find(self.run.path)
        if newest is not None and newest.id != job.id:
            return newest
        return self._resubmitted(job, code, attempt)

    def _resubmitted(self, job: Job, code: int, attempt: int | None) -> Job | None:
        """Of a job whose script was killed before it could submit itself again, as at the time limit."""
        unwanted = self.cancelled.is_set() or CANCELLED in self._words(job)  # somebody's own scancel
        if unwanted or code not in AGAIN or attempt is None:
            return None
        self.report(resubmit(self.run.path, code, self.launcher))
        newest = self.launcher.find(self.run.path)
        return newest if newest is not None and newest.id != job.id else None

    def _words(self, job: Job) -> str:
        return "" if self.here else self.launcher.explain(job)


class _States:
    """The state of a job, asked for as often as the place can bear; kept in between.

    A cluster must say twice that a job has ended, unless its script `has_concluded`: between its end and its own
    restart a job may look so.
    """

    def __init__(self, launcher: Launcher, job: Job, here: bool, has_concluded: Callable[[], bool]):
        self.launcher, self.job, self.here, self.has_concluded = launcher, job, here, has_concluded
        self.changed_at, self.asked_at, self.newest = time.monotonic(), -1e9, JobState.UNKNOWN
        self.shown = JobState.RUNNING

    def now(self) -> JobState:
        if self.here:
            return self.launcher.state(self.job)
        if time.monotonic() - self.asked_at >= self._pause():
            before, self.newest = self.newest, self.launcher.state(self.job)
            self.asked_at = time.monotonic()
            if self.newest is not before:
                self.changed_at = self.asked_at
            if self.newest is not JobState.ENDED or before is JobState.ENDED or self.has_concluded():
                self.shown = self.newest
        return self.shown

    def _pause(self) -> float:
        if self.newest is JobState.ENDED:
            return CONFIRM_SECONDS
        return STATE_SECONDS if time.monotonic() - self.changed_at < SOON_SECONDS else STATE_SECONDS_LATER


class _Told:
    """What was said of a job's state: each change, and once in a while why it still waits."""

    def __init__(self, report: Callable[[str], None], launcher: Launcher, job: Job):
        self.report, self.launcher, self.job = report, launcher, job
        self.told: JobState | None = None
        self.told_at = 0.0

    def state(self, state: JobState) -> None:
        if self.job.kind in (LOCAL, "by hand"):
            return
        waits = state is JobState.PENDING and time.monotonic() - self.told_at > 2 * CLUSTER_LINE_SECONDS
        if state is self.told and not waits:
            return
        was_silent, self.told, self.told_at = self.told is JobState.UNKNOWN, state, time.monotonic()
        if state is JobState.UNKNOWN:
            self.report(f"{self.job.kind} does not answer; {_in_words(self.job)} may well go on, asking again")
        elif state is JobState.PENDING or was_silent:
            self.report(self.launcher.explain(self.job) or f"{_in_words(self.job)}: {state.value}")


def conclude(run: RunDirectory, job: Job, words: str = "", *, attempt: int | None = None) -> tuple[int, str]:
    """Exit code and reason of a job that has ended: of its newest attempt. `words` are its place's own about it."""
    number = attempt or attempt_of(run, job)
    said = f" ({words})" if words else ""
    if number is None:
        asked = (run.path / "stop.json").is_file()
        last = last_line(newest_job_log(run), besides=NOT_AGAIN)
        return (EXIT_STOPPED if asked else EXIT_FAULT), (
            f"{_in_words(job)} ended before an attempt began{said}{': ' + last if last and not asked else ''}; "
            f"go on with: vit resume {run.path}"
        )
    verdict, log = run.attempt(number).verdict(), run.attempt(number).path / "log"
    if verdict is None:
        last = last_line(log / "supervisor.log")
        return EXIT_FAULT, (
            f"the supervisor of attempt {number} ended without a verdict{said}{': ' + last if last else ''}; "
            f"go on with: vit resume {run.path}"
        )
    code, reason = verdict["code"], verdict["reason"]
    if code == EXIT_FAULT:
        reason += said
    return code, reason if code in (EXIT_DONE, EXIT_STOPPED) else f"{reason} (logs: {log})"


def newest_job_log(run: RunDirectory) -> Path:
    """The output of the newest job's script or pods; a path that does not exist where there is none."""
    found = [path for pattern in JOB_LOGS for path in (run.path / "submit").glob(pattern)]
    return max(found, key=lambda path: path.stat().st_mtime, default=run.path / "submit" / "slurm-.out")


def last_line(path: Path, besides: str = "\n") -> str:
    """Of a file, empty where there is none; a line that begins with `besides` does not count."""
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    return next((line for line in reversed(lines) if line.strip() and not line.startswith(besides)), "")


def _in_words(job: Job) -> str:
    return f"{job.kind} job {job.id.partition(':')[0]}"
