"""The controller: submit once, watch, forward, conclude. It may die; the job lives on and is found again.

`@flow` functions and the command line call the same `control`.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cluster.job import Job, JobRequest, JobState, Launcher
from cluster.local import LocalLauncher
from cluster.profile import accelerators_here
from flows.home import tracking_uri
from flows.progress import LedgerTail
from pipeline.config.recipe import read_yaml
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED
from pipeline.preparation.preflight import require_ready
from pipeline.preparation.rehearsal import verdict as rehearsal_verdict
from pipeline.registry.tracking import Mirror
from pipeline.registry.writers import writers_of
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.training.start_table import start_table
from pipeline.words import bytes_in_words, duration_in_words, number_in_words

POLL_SECONDS = 0.3
FORWARD_SECONDS = 5.0
STOP_GRACE_SECONDS = 600.0  # a checkpoint of a large model takes minutes
MIRRORED = ("pretrain", "finetune", "evaluate")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Conclusion:
    """How a run ended: the exit code of the contract, the reason in one line, and what it left for the next stage."""

    code: int
    reason: str
    run: RunDirectory
    result: dict[str, Any]

    @property
    def message(self) -> str:
        """The state message that a person reads."""
        if self.result.get("rehearsal") and self.code == EXIT_DONE:
            return rehearsal_message(self.result)
        return f"{self.run.path.name}: {self.reason}"


class Observation(NamedTuple):
    job: Job
    state: JobState
    step: int
    last_step: int
    entry: dict


def ignore(observation: Observation) -> None:
    pass


def launcher_of(run: RunDirectory) -> Launcher:
    return LocalLauncher()


def control(
    run: RunDirectory, home: Path, report: Report, *, cancelled: threading.Event | None = None,
    observe: Callable[[Observation], None] = ignore,
) -> Conclusion:  # fmt: skip
    """Bring a run to its end: attach to its living job or submit one, watch it, forward its ledger, conclude.

    When `cancelled` is set, the job is asked to stop with a checkpoint and waited for.
    """
    plan = run.plan()
    if (done := _already_done(run)) is not None:
        report(f"{run.path.name} is already done; nothing to do")
        return done
    require_ready(run, accelerators_here())
    if plan.get("rehearsal"):
        report(
            f"rehearsal of {plan['full_run']['recipe']}: {plan['steps']['steps']} steps at full model size, "
            "with a stop and a resume"
        )
    for note in plan.get("notes", ()):
        report(f"note: {note}")
    if isinstance(config := read_run_config(run.path), TrainingConfig):
        for line in start_table(config, plan):
            report(line)
    launcher: Launcher = LocalLauncher()
    cancelled = cancelled or threading.Event()
    forwarder = Forwarder(run, home, report)
    code, reason = _one_attempt(run, launcher, report, cancelled, observe)
    if plan.get("rehearsal") and code == EXIT_STOPPED and not cancelled.is_set():
        report("stopped on request with a checkpoint, as planned; resuming")
        code, reason = _one_attempt(run, launcher, report, cancelled, observe)
    if plan.get("rehearsal") and code == EXIT_DONE:
        write_json(run.result_file, read_json(run.result_file) | rehearsal_verdict(run))
    result = read_json(run.result_file) or {}
    if best := result.get("best"):
        report(f"best: {best['metric']} {best['value']:.4f} at step {best['step']:,}: {best['directory']}")
    forwarder.finish(code, result)
    return Conclusion(code, reason, run, result)


def _already_done(run: RunDirectory) -> Conclusion | None:
    result = read_json(run.result_file)
    return None if result is None else Conclusion(EXIT_DONE, "done", run, result)


def submit(run: RunDirectory, launcher: Launcher) -> Job:
    """The run's living job, or a new one; the launcher looks before it starts."""
    number = run.last_attempt() + 1
    attempt = run.attempt(number)
    request = JobRequest(
        key=run.key,
        command=(sys.executable, "-m", "pipeline.launch", str(run.path)),
        directory=run.path,
        attempt=number,
        environment={**read_yaml(run.profile_file).get("env", {}), "VIT_ATTEMPT": str(number)},
        log=attempt.path / "log" / "supervisor.log",
    )
    return launcher.submit(request)


def _one_attempt(run, launcher, report, cancelled, observe):
    job = submit(run, launcher)
    report(f"{run.path.name}: attempt {job.attempt} runs as {job.kind} job {job.id.partition(':')[0]}; {run.path}")
    tail = LedgerTail(run, job.attempt)
    asked_to_stop = False
    while launcher.state(job) is not JobState.ENDED:
        for line in tail.lines():
            report(line)
        entry = tail.seen
        observe(Observation(job, launcher.state(job), entry.get("step", -1), tail.last_step, entry))
        if cancelled.is_set() and not asked_to_stop:
            asked_to_stop = True
            report("stopping")
            threading.Thread(target=launcher.cancel, args=(job, STOP_GRACE_SECONDS), daemon=True).start()
        time.sleep(POLL_SECONDS)
    for line in tail.lines(last=True):
        report(line)
    return conclude(run, job)


def conclude(run: RunDirectory, job: Job) -> tuple[int, str]:
    """Exit code and reason of an attempt that has ended."""
    attempt = run.attempt(job.attempt)
    verdict = attempt.verdict()
    if verdict is None:
        tail = _last_line(attempt.path / "log" / "supervisor.log")
        return (
            EXIT_FAULT,
            f"the supervisor of attempt {job.attempt} ended without a verdict{': ' + tail if tail else ''}; "
            f"go on with: vit resume {run.path}",
        )
    code, reason = verdict["code"], verdict["reason"]
    if code not in (EXIT_DONE, EXIT_STOPPED):
        reason = f"{reason} (logs: {attempt.path / 'log'})"
    return code, reason


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "")


def rehearsal_message(result: dict[str, Any]) -> str:
    """The verdict of a rehearsal and the cost of the run it stands for, in one line."""
    return (
        f"rehearsal ok: stopped and resumed, {number_in_words(result['images_per_second'])} images/s, "
        f"{bytes_in_words(result['peak_memory_bytes_per_rank'])} per process "
        f"(planned {bytes_in_words(result['planned_memory_bytes_per_rank'])}); "
        f"the full run of {result['full_run_samples']:,} images "
        f"({result['full_run_steps']:,} steps, on {result['full_run_on']}) "
        f"would take {duration_in_words(3600 * result['full_run_hours'])} here, "
        f"{number_in_words(result['full_run_device_hours'])} device-hours"
    )


class Forwarder:
    """Forwards the ledger from a thread of its own, so that a slow server never delays what a person sees.

    To MLflow, and to the writers that the run's config names.
    """

    def __init__(self, run: RunDirectory, home: Path, report: Report):
        self.mirror = Mirror(run, tracking_uri(home), home)
        self.writers = writers_of(run)
        self.report, self.warned, self.ended = report, set[str](), threading.Event()
        self.enabled = run.plan()["stage"] in MIRRORED
        self.thread = threading.Thread(target=self._run, daemon=True)
        if self.enabled:
            self.thread.start()

    def _run(self) -> None:
        while not self.ended.wait(FORWARD_SECONDS):
            self._guarded(self._destination, self.mirror.forward)
            for writer in self.writers:
                self._guarded(type(writer).__name__, writer.forward)

    def finish(self, code: int, result: dict[str, Any]) -> None:
        if not self.enabled:
            return
        self.ended.set()
        self.thread.join(timeout=60)
        status = {EXIT_DONE: "FINISHED", EXIT_STOPPED: "KILLED"}.get(code, "FAILED")
        tags = {"vit.rehearsal": str(bool(result.get("rehearsal"))).lower()}
        metrics = result["metrics"] if result.get("stage") == "evaluate" else {}
        several = len(metrics) > 1
        scores = {
            f"{model}/{key}" if several else key: value
            for model, scored in metrics.items()
            for key, value in scored.items()
        }
        self._guarded(self._destination, lambda: self.mirror.finish(status, metrics=scores, tags=tags))
        for writer in self.writers:
            self._guarded(type(writer).__name__, writer.finish)

    @property
    def _destination(self) -> str:
        return f"MLflow at {self.mirror.tracking_uri}"

    def _guarded(self, destination: str, forward: Callable[[], Any]) -> None:
        """Tracking never ends a run: what could not be sent is sent later by `vit reconcile` or the next attempt."""
        try:
            forward()
        except Exception as error:  # MLflow raises whatever its store and its HTTP library raise
            if destination not in self.warned:
                self.warned.add(destination)
                first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.report(f"{destination} could not be written, the ledger keeps everything: {first_line[:160]}")


@contextlib.contextmanager
def stop_on_interrupt(cancelled: threading.Event) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks for a stop with a checkpoint; a second Ctrl-C ends the watching only."""

    def handle(number: int, frame: object) -> None:
        if cancelled.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        cancelled.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
