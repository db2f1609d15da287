"""The controller: submit once, follow, forward, conclude. It may die; the job lives on and is found again.

`@flow` functions and the command line call the same `control`.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.profile import accelerators_here
from flows.control.following import Follower, Observation, ignore
from flows.control.forwarding import Forwarder
from flows.control.submission import launcher_of, runs_here
from pipeline.config.stages import read_run_config
from pipeline.config.training import TrainingConfig
from pipeline.errors import EXIT_DONE
from pipeline.forecast.grading import forecast_lines, grade_evaluated, graded_in_words
from pipeline.preparation.preflight import require_ready
from pipeline.preparation.rehearsal import verdict as rehearsal_verdict
from pipeline.run_directory import RunDirectory, read_json, write_json
from pipeline.training.start_table import start_table
from pipeline.words import bytes_in_words, duration_in_words, number_in_words

Report = Callable[[str], None]


@dataclass(frozen=True)
class Conclusion:
    """How a run ended: the exit code of the contract, the reason in one line, and what it left for the next stage.

    Of one that was left running: `left`, code 0, and no result.
    """

    code: int
    reason: str
    run: RunDirectory
    result: dict[str, Any]
    left: bool = False

    @property
    def message(self) -> str:
        """The state message that a person reads."""
        if self.result.get("rehearsal") and self.code == EXIT_DONE:
            return rehearsal_message(self.result)
        return f"{self.run.path.name}: {self.reason}"


def control(
    run: RunDirectory, home: Path, report: Report, *, cancelled: threading.Event | None = None,
    detached: threading.Event | None = None, observe: Callable[[Observation], None] = ignore,
    introduced: bool = False,
) -> Conclusion:  # fmt: skip
    """Bring a run to its end: attach to its living job or submit one, follow it, forward its ledger, conclude.

    When `cancelled` is set, the job is asked to stop with a checkpoint and waited for; when `detached` is set, the job
    goes on and this ends. `observe` is told what is seen, at most every two seconds. A run that was `introduced`, as
    one of many, is not again.
    """
    if (done := _already_done(run)) is not None:
        report(f"{run.path.name} is already done; nothing to do")
        if not runs_here(run):  # maybe nobody followed it to its end
            Forwarder(run, home, report).finish(EXIT_DONE, done.result)
        return done
    require_ready(run, accelerators_here())
    if not introduced:
        introduce(run, report)
    cancelled, detached = cancelled or threading.Event(), detached or threading.Event()
    follower = Follower(run, launcher_of(run), report, cancelled=cancelled, detached=detached, observe=observe)
    forwarder = Forwarder(run, home, report)
    code, reason = follower.follow()
    if follower.has_left:
        forwarder.leave()
        return Conclusion(EXIT_DONE, reason, run, {}, left=True)
    result = result_of(run) if code == EXIT_DONE else read_json(run.result_file) or {}
    if best := result.get("best"):
        report(f"best: {best['metric']} {best['value']:.4f} at step {best['step']:,}: {best['directory']}")
    for line in _graded(run, code, result):
        report(line)
    forwarder.finish(code, result)
    return Conclusion(code, reason, run, result)


def _graded(run: RunDirectory, code: int, result: dict[str, Any]) -> Iterator[str]:
    """A run's forecast beside what came; of an evaluation, those of the runs that it says the outcome of."""
    if found := result.get("forecast"):
        yield graded_in_words(found)
    if code == EXIT_DONE and result.get("stage") == "evaluate":
        yield from grade_evaluated(run)


def introduce(run: RunDirectory, report: Report) -> None:
    """What a person should know of a run before it begins."""
    plan = run.plan()
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
        for line in forecast_lines(run):
            report(line)


def _already_done(run: RunDirectory) -> Conclusion | None:
    return Conclusion(EXIT_DONE, "done", run, result_of(run)) if run.result_file.is_file() else None


def result_of(run: RunDirectory) -> dict[str, Any]:
    """The result of a run that is done; a rehearsal's verdict is added by whoever looks first."""
    result = read_json(run.result_file) or {}
    if run.plan().get("rehearsal") and result and "verdict" not in result:
        result |= rehearsal_verdict(run)
        write_json(run.result_file, result)
    return result


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


@contextlib.contextmanager
def on_interrupt(event: threading.Event, *numbers: int, at_once: bool = False) -> Iterator[None]:
    """Set `event` at the first of these signals; a second Ctrl-C ends the watching at once.

    `at_once` the first raises KeyboardInterrupt, too: of work that is done by this process, and stops by it in order.
    """

    def handle(number: int, frame: object) -> None:
        again = event.is_set() and number == signal.SIGINT
        event.set()
        if again or at_once:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
