"""What a run says of itself while it trains: the ledger of every step, and a log that a tired person can read.

Rank 0 reports; the other ranks only say how long their own share of the work took.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from functools import cache

from pipeline.checkpoints.retention import Best, best_checkpoint
from pipeline.config.training import TrainingConfig
from pipeline.forecast.grading import grade_at_end
from pipeline.loading.loader import Loader
from pipeline.rank import Rank
from pipeline.run_directory import Checkpoint
from pipeline.telemetry.clock import PARTS
from pipeline.telemetry.ledger import Ledger
from pipeline.telemetry.speed import SpeedMeter
from pipeline.telemetry.stragglers import Stragglers, window_steps
from pipeline.training.engine import Engine, StepResult
from pipeline.training.saving import CHECKPOINT
from pipeline.training.start_table import start_table
from pipeline.training.supply import DAMAGED, LEFT_OUT, Supply
from pipeline.words import bytes_in_words, duration_in_words

WARM_STEPS = 20  # after which the loader's speed can be told
LINE_SECONDS = 1.0  # between progress lines at least, and between means of `SpeedMeter.figures`: nobody reads more
FLUSH_SECONDS = 0.2  # between writes to the ledger: short steps share one, else they and shared file systems feel it
log = logging.getLogger(__name__)


class Report:
    """Writes the ledger and the log of steps [first, last) of one attempt. Collective: all ranks call it alike.

    A context manager: however the steps end, what was told of them is written.
    """

    def __init__(self, me: Rank, config: TrainingConfig, plan: dict, engine: Engine, first: int, last: int):
        self.plan, self.last = plan, last
        self.ledger = Ledger(me.attempt) if me.is_first else None
        self.meter = SpeedMeter(plan, last)
        self.stragglers = Stragglers(me.rank, me.world_size, engine.device) if me.world_size > 1 else None
        self._untold: list[tuple] = []  # what `_line` makes the ledger's lines of
        self._flushed_at = self._figured_at = self._told_at = -math.inf
        self._every, self._window = config.log_every_steps, window_steps(config.log_every_steps)
        self._told_in_any_case, self._summed_up = {first + 1, last}, {min(first + WARM_STEPS, last), last}

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def step(
        self, done: int, result: StepResult, rate: float, supply: Supply, loader: Loader, scores: Mapping[str, float]
    ) -> None:
        """Tell of the step that took the run to `done` steps, as `meter` has it, and of the state's `scores` if any."""
        slow_ranks = self._slow_ranks() if self.stragglers and done % self._window == 0 else ()
        if self.ledger is None:
            return
        now = self.meter.ended
        told = done % self._every == 0 and now - self._told_at >= LINE_SECONDS or done in self._told_in_any_case
        figures = {}
        if told or scores or now - self._figured_at >= LINE_SECONDS or done in self._summed_up:
            self._figured_at = now
            figures = self.meter.figures(done) | supply.metrics(loader, self.plan)
        self._untold.append((done, time.time(), self.meter.last_seconds, result, rate, figures, scores))
        if figures or result.skipped or now - self._flushed_at >= FLUSH_SECONDS:
            self._flushed_at = now
            self.flush()
        if told:
            self._told_at = now
            log.info(progress_words(done, self.last, result, rate, figures))
        for line in slow_ranks:
            log.warning(line)
        if done in self._summed_up:
            log.info(supply.in_words(loader, figures, self.plan))

    def _slow_ranks(self) -> list[str]:
        """One line per rank that begins or ceases to hold up the others. Collective."""
        return self.stragglers.of_window(self.meter.own_seconds(self._window), self.meter.means().whole)

    def flush(self) -> None:
        """All that was told is in the ledger's file when this returns. Steps of more than 0.2 s are at once."""
        if self.ledger is not None:
            untold, self._untold = self._untold, []
            self.ledger.write(self._line(*one) for one in untold)

    def _line(
        self, done: int, told_at: float, seconds: float, result: StepResult, rate: float,
        figures: Mapping[str, float], scores: Mapping[str, float],
    ) -> dict[str, float]:  # fmt: skip
        line = {
            "step": done,
            "time": round(told_at, 3),
            "perf/last_step_seconds": round(seconds, 5),
            "train/loss": result.loss,
            "train/learning_rate": rate,
            "train/gradient_norm": result.gradient_norm,
            "train/skipped": float(result.skipped),
        }
        for name, told_as in _names_told(tuple(result.sums)):
            line[told_as] = result.sums[name] / self.meter.images_per_step
        line.update(figures)
        line.update(scores)
        return line


@cache
def _names_told(sums: tuple[str, ...]) -> list[tuple[str, str]]:
    """Which of a step's sums the ledger tells, and by what names; not what only the loop counts."""
    return [(name, f"train/{name}") for name in sums if not name.startswith((DAMAGED, LEFT_OUT, CHECKPOINT))]


def log_to_stdout(me: Rank) -> None:
    """Rank 0 tells the run's story; the others speak up only when something is wrong.

    What is no progress (checkpoints, roll-backs, what was damaged) it also writes where the controller reads it.
    """
    level = logging.INFO if me.is_first else logging.WARNING
    logging.basicConfig(
        stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("pipeline").setLevel(level)
    if me.is_first:
        events = logging.FileHandler(me.attempt.events)
        events.setFormatter(logging.Formatter("%(message)s"))
        events.addFilter(lambda record: record.name != __name__)  # the progress that the ledger tells too
        logging.getLogger("pipeline").handlers[:] = [events]  # in place of that of the run before, in a sequence


def log_start(config: TrainingConfig, plan: dict) -> None:
    for line in start_table(config, plan):
        log.info(line)


def result_of(me: Rank, config: TrainingConfig, plan: dict) -> dict:
    """What result.json says of a run that reached its last step."""
    checkpoints = me.run.committed_checkpoints()
    result = {
        "format_version": 1,
        "stage": config.stage,
        "rehearsal": bool(plan.get("rehearsal")),
        "steps": plan["steps"]["steps"],
        "checkpoint": str(checkpoints[0].directory) if checkpoints else None,
        "best": _best(checkpoints, config.validation.best_metric),
        "data_fingerprint": plan["data"]["fingerprint"],
        "metrics": {key: value for key, value in _last_ledger_line(me).items() if "/" in key},
    }
    forecast = grade_at_end(me.run, result)
    return result | ({"forecast": forecast} if forecast else {})


def _best(checkpoints: list[Checkpoint], metric: Best | None) -> dict | None:
    """Which checkpoint was the best in validation, and by what; None where none was scored."""
    best = best_checkpoint(checkpoints, metric)
    if best is None:
        return None
    value = best.manifest["validation"][metric[0]]
    return {"step": best.step, "directory": str(best.directory), "metric": metric[0], "value": value}


def progress_words(
    step: int, last: int, result: StepResult, rate: float, figures: Mapping[str, float]
) -> str:  # fmt: skip
    """One line that says where the run stands, how it learns, and where its time goes."""
    parts = "  ".join(f"{part} {1000 * figures[f'perf/{part}_seconds']:.3g}" for part in PARTS)
    mfu = f"  MFU {100 * figures['perf/mfu']:.1f} %" if "perf/mfu" in figures else ""
    return (
        f"step {step}/{last}  loss {result.loss:.4f}  gradient norm {result.gradient_norm:.3f}  rate {rate:.3g}  "
        f"{figures['perf/images_per_second']:.1f} images/s{mfu}  "
        f"{1000 * figures['perf/step_seconds']:.3g} ms a step ({parts}) and "
        f"{1000 * figures['perf/between_steps_seconds']:.3g} between steps  "
        f"data wait {100 * figures['perf/data_wait_share']:.0f} %  "
        f"{bytes_in_words(figures['perf/peak_memory_bytes'])}  {duration_in_words(figures['perf/seconds_left'])} left"
        + ("  (skipped)" if result.skipped else "")
    )


def _last_ledger_line(me: Rank) -> dict:
    for number in range(me.attempt.number, 0, -1):
        ledger = me.run.attempt(number).ledger
        if ledger.is_file() and (lines := ledger.read_text().splitlines()):
            return json.loads(lines[-1])
    return {}
