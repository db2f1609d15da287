"""What a run says of itself while it trains: the ledger of every step, and a log that a tired person can read.

Rank 0 reports; on the other ranks every call is silent.
"""

import json
import logging
import sys

from pipeline.config.training import TrainingConfig
from pipeline.loading.loader import Loader
from pipeline.rank import Rank
from pipeline.training.engine import StepResult
from pipeline.training.ledger import Ledger, SpeedMeter
from pipeline.training.saving import CHECKPOINT
from pipeline.training.supply import DAMAGED, Supply

WARM_STEPS = 20  # after which the loader's speed can be told
log = logging.getLogger(__name__)


class Report:
    """Writes the ledger and the log of steps [first, last) of one attempt."""

    def __init__(self, me: Rank, config: TrainingConfig, plan: dict, first: int, last: int):
        self.config, self.plan, self.first, self.last = config, plan, first, last
        self.ledger = Ledger(me.attempt) if me.is_first else None
        self.meter = SpeedMeter(config.global_batch_size, last)

    def step(self, done: int, result: StepResult, rate: float, supply: Supply, loader: Loader, seconds: float) -> None:
        """Tell of the step that took the run to `done` steps, in `seconds`."""
        self.meter.add(seconds, supply.seconds_waited())
        if self.ledger is None:
            return
        figures = self.meter.figures(done)
        self.ledger.write(done, **self._metrics(result, rate), **supply.metrics(loader, self.plan), **figures)
        if done % self.config.log_every_steps == 0 or done in (self.first + 1, self.last):
            _log_progress(done, self.last, result, figures)
        if done in (min(self.first + WARM_STEPS, self.last), self.last):
            log.info(supply.in_words(loader, figures, self.plan))

    def _metrics(self, result: StepResult, rate: float) -> dict[str, float]:
        metrics = {
            "train/loss": result.loss,
            "train/learning_rate": rate,
            "train/gradient_norm": result.gradient_norm,
            "train/skipped": float(result.skipped),
        }
        return metrics | {
            f"train/{name}": total / self.config.global_batch_size
            for name, total in result.sums.items()
            if not name.startswith((DAMAGED, CHECKPOINT))
        }


def log_to_stdout(me: Rank) -> None:
    """Rank 0 tells the run's story; the others speak up only when something is wrong."""
    level = logging.INFO if me.is_first else logging.WARNING
    logging.basicConfig(
        stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    logging.getLogger("pipeline").setLevel(level)


def log_start(config: TrainingConfig, plan: dict) -> None:
    batches = plan["batches"]
    log.info(
        "global batch %d = %d ranks x %d images x %d accumulated; ZeRO stage %d, %s, %d steps, clip %s",
        batches["global_batch_size"], batches["world_size"], batches["micro_batch_size"],
        batches["gradient_accumulation_steps"], config.zero.stage, plan["precision"], plan["steps"]["steps"],
        config.optimizer.max_grad_norm or "off",
    )  # fmt: skip


def result_of(me: Rank, config: TrainingConfig, plan: dict) -> dict:
    """What result.json says of a run that reached its last step."""
    checkpoint = me.run.newest_checkpoint()
    return {
        "format_version": 1,
        "stage": config.stage,
        "rehearsal": bool(plan.get("rehearsal")),
        "steps": plan["steps"]["steps"],
        "checkpoint": str(checkpoint.directory) if checkpoint else None,
        "data_fingerprint": plan["data"]["fingerprint"],
        "metrics": {key: value for key, value in _last_ledger_line(me).items() if "/" in key},
    }


def _log_progress(step: int, last: int, result: StepResult, figures: dict[str, float]) -> None:
    log.info(
        "step %d/%d  loss %.4f  gradient norm %.3f  %.1f images/s  data wait %.0f %%  %.0f s left%s",
        step, last, result.loss, result.gradient_norm, figures["perf/images_per_second"],
        100 * figures["perf/data_wait_share"], figures["perf/seconds_left"], "  (skipped)" if result.skipped else "",
    )  # fmt: skip


def _last_ledger_line(me: Rank) -> dict:
    for number in range(me.attempt.number, 0, -1):
        ledger = me.run.attempt(number).ledger
        if ledger.is_file() and (lines := ledger.read_text().splitlines()):
            return json.loads(lines[-1])
    return {}
