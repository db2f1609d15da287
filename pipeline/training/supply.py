"""The loop's account of its data: where the stream stands, what was damaged, and whether the loader keeps up."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.config.training import TrainingConfig
from pipeline.errors import Cause, DataError
from pipeline.loading.loader import Loader, RawBatch
from pipeline.loading.stream import CAUSES
from pipeline.loading.verdict import observed_verdict
from pipeline.shards.order import merged_ranges, pass_over

DAMAGED = "damaged_"
CAUSE_OF = {DAMAGED + cause: cause for cause in CAUSES}  # by the names of `Supply.counts`
LEFT_OUT = "left_out"  # of those names too: samples on a tombstone list, for which another stood in
NOTHING_COUNTED = dict.fromkeys((*CAUSE_OF, LEFT_OUT), 0.0)
log = logging.getLogger(__name__)


class Supply:
    """The data state of a run: ranges passed over, and over all ranks and attempts what was damaged or left out."""

    def __init__(
        self, config: TrainingConfig, manifest: Mapping[str, Any], rolled_back: Sequence[tuple[int, int]] = (),
        tombstones: Sequence[Mapping[str, Any]] = (),
    ):  # fmt: skip
        """See `begin_from`. `tombstones` is `Sources.tombstones` as this attempt found them."""
        self.config, self._tombstones = config, [dict(one) for one in tombstones]
        self._leaves_out = any(one["count"] for one in tombstones)
        self.begin_from(manifest, rolled_back)

    def begin_from(self, manifest: Mapping[str, Any], rolled_back: Sequence[tuple[int, int]]) -> None:
        """`manifest` is the resumed checkpoint's; empty at the start of a run. `rolled_back`: a range per roll-back."""
        self.rolled_back = sorted({*map(tuple, manifest.get("rolled_back", [])), *rolled_back})
        before = map(tuple, manifest.get("skipped", []))
        self.skipped = merged_ranges([*self.config.data.skipped, *before, *self.rolled_back])
        before = manifest.get("damaged", {})
        self.damaged = {cause: int(before.get(cause, 0)) for cause in CAUSES}
        self.left_out = int(manifest.get(LEFT_OUT, 0))
        self.tombstones = self._history(manifest.get("tombstones", []), manifest.get("step", 0))
        self._new: Counter[Cause | str] = Counter()  # of this rank, in this step
        self._waited = 0.0

    def _history(self, before: list[dict], step: int) -> list[dict]:
        """Which tombstone lists held from which step on; steps before the first entry left nothing out."""
        before = [entry for entry in before if entry["step"] < step]
        held = before[-1]["sources"] if before else [{"count": 0, "sha256": None}] * len(self._tombstones)
        return before if held == self._tombstones else [*before, {"step": step, "sources": self._tombstones}]

    def draw(self, loader: Loader) -> RawBatch:
        """The next batch, with what it says was damaged counted; DataError beyond what `data.max_damaged` allows."""
        asked = time.perf_counter()
        batch = next(loader)
        self._waited += time.perf_counter() - asked
        if self._leaves_out:
            self._new[LEFT_OUT] += loader.stream.num_left_out(batch.positions.numpy())
        for one in batch.damaged:
            self._new[one.cause] += 1
            log.warning("position %d: %s; the next sample of its shard stands in", one.position, one.detail)
            total = sum(self.damaged.values()) + sum(self._new[cause] for cause in CAUSES)
            self._require_allowed(total, one.cause, f": {one.detail}")
        return batch

    def seconds_waited(self) -> float:
        """Seconds that went by in `draw` since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def counts(self) -> dict[str, float]:
        """This rank's counts of the step, for `Engine.step` to add up."""
        if not self._new:
            return NOTHING_COUNTED
        counts, self._new = self._new, Counter()
        return {name: float(counts[cause]) for name, cause in {**CAUSE_OF, LEFT_OUT: LEFT_OUT}.items()}

    def add(self, sums: Mapping[str, float]) -> None:
        """Take the counts of all ranks after a step; DataError on every rank beyond what is allowed."""
        if not any(map(sums.__getitem__, NOTHING_COUNTED)):
            return
        self.left_out += int(sums[LEFT_OUT])
        new = {cause: int(sums[name]) for name, cause in CAUSE_OF.items() if sums[name]}
        if not new:
            return
        self.damaged = {cause: self.damaged[cause] + new.get(cause, 0) for cause in CAUSES}
        commonest = max(self.damaged, key=lambda cause: self.damaged[cause])
        self._require_allowed(sum(self.damaged.values()), commonest, "; the ranks' logs name them")

    def _require_allowed(self, total: int, cause: Cause, detail: str) -> None:
        if total > self.config.data.max_damaged:
            allowed = self.config.data.max_damaged
            raise DataError(f"{total} samples damaged, data.max_damaged allows {allowed}{detail}", cause=cause)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps says of the data: the next position, and what was not used."""
        return {
            "position": self.position(step),
            "skipped": self.skipped,
            "damaged": self.damaged,
            "rolled_back": self.rolled_back,
            LEFT_OUT: self.left_out,
            "tombstones": self.tombstones,
        }

    def position(self, step: int) -> int:
        """The first position that `step` reads."""
        return int(pass_over(np.array([step * self.config.global_batch_size]), self.skipped)[0])

    def metrics(self, loader: Loader, plan: Mapping[str, Any]) -> dict[str, float]:
        """For the ledger: images per second of the loaders of all ranks, samples damaged by cause, and left out."""
        damaged = {f"data/{DAMAGED}{cause}": float(count) for cause, count in self.damaged.items() if count}
        damaged |= {f"data/{LEFT_OUT}": float(self.left_out)} if self.left_out else {}
        return {"perf/loader_images_per_second": round(self._capacity(loader, plan), 1)} | damaged

    def in_words(self, loader: Loader, figures: Mapping[str, float], plan: Mapping[str, Any]) -> str:
        """Whether the run is input-bound, and what to change if it is."""
        return observed_verdict(
            self._capacity(loader, plan), figures["perf/images_per_second"], figures["perf/data_wait_share"],
            plan["loader_workers"], self.config,
        )  # fmt: skip

    @staticmethod
    def _capacity(loader: Loader, plan: Mapping[str, Any]) -> float:
        return (loader.images_per_second or 0.0) * plan["batches"]["world_size"]
