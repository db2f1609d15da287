"""When a run saves its training state, and what stays on disk."""

import logging
import time

from pipeline.config.training import TrainingConfig
from pipeline.rank import Rank
from pipeline.training.checkpoint import prune_checkpoints, save_checkpoint
from pipeline.training.engine import Engine
from pipeline.training.supply import Supply

log = logging.getLogger(__name__)


class Saver:
    """Saves the state of `engine` at the cadence of `checkpoint`. Collective: all ranks make and call it alike."""

    def __init__(self, me: Rank, config: TrainingConfig, plan: dict, engine: Engine):
        self.me, self.config, self.plan, self.engine = me, config, plan, engine

    def is_due(self, done: int) -> bool:
        """Whether the state after `done` steps is to be saved."""
        return done % self.config.checkpoint.every_steps == 0 or done == self.plan["steps"]["steps"]

    def save(self, done: int, supply: Supply) -> None:
        self.me.phase = "checkpoint"
        started = time.perf_counter()
        where = save_checkpoint(
            self.engine.state, self.me.run, self.me.attempt, rank=self.me.rank, world_size=self.me.world_size,
            frozen=self.engine.frozen, facts=self._facts(done, supply),
        )  # fmt: skip
        if self.me.is_first:
            log.info("saved %s in %.1f s", where.name, time.perf_counter() - started)
            prune_checkpoints(self.me.run, self.config.checkpoint.keep)
        self.me.phase = "train"

    def _facts(self, done: int, supply: Supply) -> dict:
        return {
            "step": done,
            "updates": self.engine.state.updates,
            **supply.state(done),
            "stage": self.config.stage,
            "encoder": self.config.encoder.model_dump(),
            "objective": self.config.objective.model_dump(),
            "num_classes": self.plan["num_classes"],
            "ema": self.config.ema_decay > 0,
            "data_fingerprint": self.plan["data"]["fingerprint"],
            "config_sha256": self.plan["config_sha256"],
        }
