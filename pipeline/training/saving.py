"""When a run saves its training state, and how the writing goes on behind the training.

Training waits for a copy into host memory; a thread of each rank writes it. Whether all have written travels with the
numbers that every step adds up over the ranks anyway (`counts` and `follow`), so no rank ever waits for a disk, and a
write that failed ends all ranks at the same step. Then rank 0 commits, in its thread too.
"""

import copy
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoints.cadence import Cadence
from pipeline.checkpoints.checkpoint import commit, partial_directory, write_share, write_weights
from pipeline.checkpoints.identity import facts_of_run
from pipeline.checkpoints.mirror import CheckpointMirror
from pipeline.checkpoints.retention import Best, prune_checkpoints
from pipeline.checkpoints.snapshot import Snapshot
from pipeline.config.plan import StepPlan
from pipeline.config.training import TrainingConfig
from pipeline.errors import FaultError
from pipeline.rank import Rank
from pipeline.training.engine import Engine
from pipeline.training.supply import Supply

CHECKPOINT = "checkpoint_"  # what the names of `counts` begin with
PENDING, FAILED, TIME = (CHECKPOINT + name for name in ("pending", "failed", "time"))
NOTHING_SAVED = dict.fromkeys((PENDING, FAILED, TIME), 0.0)
log = logging.getLogger(__name__)


class Saver:
    """Saves the state of `engine` at the cadence of `checkpoint`. Collective: all ranks make and call it alike.

    All ranks are in the same of three states: nothing is being saved, all write, or rank 0 commits what all wrote.
    Training goes on while the state is copied, until a step is about to change it: see Snapshot.
    Where `checkpoint.every_steps` is not set, rank 0's clock says for all when it is time.
    """

    def __init__(self, me: Rank, config: TrainingConfig, plan: dict, engine: Engine, *, best: Best | None = None):
        """The checkpoint whose validation is `best` stays on disk; see `save`."""
        self.me, self.config, self.plan, self.engine, self.best = me, config.checkpoint, plan, engine, best
        lengths = StepPlan(**plan["steps"])
        self._last, self._ends = lengths.steps, (lengths.steps, lengths.cooldown_begins)
        cycles = (self.config.every_steps, self.config.keep_every_steps, self.config.weights_every_steps)
        self._cycles = [steps for steps in cycles if steps]
        self._snapshot = Snapshot(engine.state, me.rank, me.world_size)
        engine.before_change = self._snapshot.hold
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._task: Future | None = None  # this rank's part of the save under way
        self._facts: dict[str, Any] | None = None  # of the save under way
        self._committing = False
        self._asked = self._started = self._begun = 0.0
        self._cadence = Cadence(self.config.hours_between_failures, plan["nodes"], time.monotonic())
        self._is_time = self._awaited = False
        self._by_clock = me.is_first and self.config.every_steps is None
        self._mirror = CheckpointMirror(self.config.mirror, me.run) if self.config.mirror and me.is_first else None
        if self._mirror and (newest := me.run.newest_checkpoint()):
            self._mirror.copy(newest)  # unless it is there: the attempt before may have been killed while it copied

    def is_due(self, done: int) -> bool:
        """Whether the state after `done` steps is to be saved."""
        if self._is_time or done in self._ends:
            return True
        for steps in self._cycles:  # a generator's frame costs more than the question
            if done % steps == 0:
                return True
        return False

    def _is_last(self, done: int) -> bool:
        return done == self._last

    def save(
        self, done: int, supply: Supply, *, validation: Mapping[str, float] | None = None, wait: bool = False
    ) -> None:
        """Save the state after `done` steps; of the last step, or with `wait`, it is committed when this returns.

        `validation` holds the state's metrics, for the manifest.
        """
        phase, self.me.phase, asked = self.me.phase, "checkpoint", time.perf_counter()
        if self._facts is not None and self.me.is_first:
            log.info("step %d is still being written: training waits for it", self._facts["step"])
        self.finish()
        self._asked, self._started = asked, time.perf_counter()
        self._awaited = wait or self._is_last(done)
        self._snapshot.lend() if self._awaited else self._snapshot.take()
        self._facts = self._facts_of(done, supply) | ({"validation": dict(validation)} if validation else {})
        self._cadence.saved(time.monotonic())
        self._begin(write_share, self._snapshot, self.engine.frozen, self._partial(done))
        if self._awaited:
            self.finish()
        self._begun = time.perf_counter() - asked
        self.me.phase = phase

    def finish(self) -> None:
        """Wait until the save under way is committed; FaultError on every rank where it failed. Collective."""
        while self._facts is not None:
            if self._task is not None:
                self._task.exception()  # waits; `follow` raises it on all ranks
            self.follow(self.engine.add_up(self.counts()))

    def counts(self) -> dict[str, float]:
        """How far this rank is with the save under way, for `Engine.step` to add up."""
        if self._facts is None and not self._by_clock:
            return NOTHING_SAVED
        done = self._task is None or self._task.done()
        failed = done and self._task is not None and self._task.exception() is not None
        by_clock = self._by_clock and self._cadence.is_time(time.monotonic())
        return {PENDING: float(not done), FAILED: float(failed), TIME: float(by_clock)}

    def follow(self, sums: Mapping[str, float]) -> None:
        """Take what all ranks counted: commit when all have written. FaultError on every rank where one failed."""
        if sums[FAILED]:
            raise FaultError(self._reason())
        self._is_time = sums[TIME] > 0
        if self._facts is None or sums[PENDING]:
            return
        self._task = None
        if self._committing:
            self._facts, self._committing = None, False
            return
        self._committing = True
        if self.me.is_first:
            self._begin(self._commit)

    def _begin(self, work: Callable[..., None], *arguments: Any) -> None:
        self._task = self._thread.submit(work, *arguments)

    def _commit(self) -> None:
        checkpoint = commit(self.me.run, self.me.attempt, self.engine.state, self.me.world_size, self._facts)
        now = time.perf_counter()
        waited = now - self._asked if self._awaited else self._begun + self._snapshot.seconds_waited()
        seconds = now - self._started
        log.info("saved %s: training waited %.2f s, complete in %.1f s", checkpoint.directory.name, waited, seconds)
        if self.config.weights_every_steps and checkpoint.step % self.config.weights_every_steps == 0:
            write_weights(checkpoint, self.me.run.weights / checkpoint.directory.name)
        removed = prune_checkpoints(self.me.run, self.config, self.best)
        self._tell_interval(waited, seconds)
        if self._mirror:
            self._mirror.copy(checkpoint)
            self._mirror.remove(removed)
            if self._awaited:
                self._mirror.wait()

    def _tell_interval(self, waited: float, seconds: float) -> None:
        """Take the next interval from what this save cost, and say so where it changes by much."""
        before = self._cadence.interval_seconds
        self._cadence.measured(waited, seconds)
        interval = self._cadence.interval_seconds
        if self.config.every_steps is None and not 0.5 < interval / before < 2:
            log.info(
                "checkpoints every %.0f minutes from here on: a save costs %.2f s of training, and a failure is to be "
                "expected every %.0f hours", interval / 60, waited, self._cadence.between_failures / 3600,
            )  # fmt: skip

    def _partial(self, step: int) -> Path:
        return partial_directory(self.me.run, self.me.attempt, step)

    def _reason(self) -> str:
        """What went wrong first, by rank. Collective, once, when some rank has failed."""
        error = self._task.exception() if self._task is not None and self._task.done() else None
        own = str(error) or type(error).__name__ if error else None
        reasons: list[Any] = [own] * self.me.world_size
        if self.me.world_size > 1:
            dist.all_gather_object(reasons, own)
        rank = next(rank for rank, reason in enumerate(reasons) if reason)
        return f"step {self._facts['step']} was not saved, earlier checkpoints stand: rank {rank}: {reasons[rank]}"

    def _facts_of(self, done: int, supply: Supply) -> dict[str, Any]:
        return {
            "step": done,
            "updates": self.engine.state.updates,
            **copy.deepcopy(supply.state(done)),  # it is written when later steps have counted on
            **facts_of_run(self.engine.config, self.plan),
        }
