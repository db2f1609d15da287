"""Brings shards into the node's cache ahead of their use, in a process of its own beside each rank.

What comes when is a pure function of the step, so nothing is guessed and nothing is told but how far the rank is. The
process is to its rank what a loader's worker is: it leaves stop signals to the rank and dies with it, however it dies.
It reports no failure: whoever reads a shard that could not be staged meets the same fault and raises it.
"""

import atexit
import heapq
import logging
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.parenthood import serve_parent
from pipeline.shards.reader import ShardReader
from pipeline.storage.cache import ShardCache

log = logging.getLogger(__name__)

DOWNLOADS = 4  # at a time
POLL_SECONDS = 0.05
RENEW_SECONDS = 5.0  # how often shards that are still needed have their time of use renewed
MOST_STEPS_AHEAD = 1000  # where all that is to come fits into `ahead_bytes`

ShardsOfStep = Callable[[int], Iterable[tuple[int, int]]]


class Stager:
    """Stages the shards of steps [first_step, num_steps) from the moment it is made until `close`.

    `shards_of_step(step)` gives the (source, shard) pairs a step reads, `source` an index into `readers`. At most
    `ahead_bytes` of shards that no step has used yet are staged (and half of what `cache` holds, the readers' own), or
    one shard where it alone is larger. Ranks of a node share the cache, so each may ask for its part. To be made on
    the main thread, whose end would end the process too; and before this process itself reads shards from a URL, so
    that the faster client is left to the new process.
    """

    def __init__(
        self,
        readers: ShardReader | Sequence[ShardReader],
        cache: ShardCache | None,
        shards_of_step: ShardsOfStep,
        num_steps: int,
        ahead_bytes: int,
        *,
        first_step: int = 0,
    ):
        readers = [readers] if isinstance(readers, ShardReader) else list(readers)
        self._progress = memoryview(mmap.mmap(-1, 8)).cast("q")  # anonymous and shared: nothing has a name
        self._progress[0] = first_step - 1
        self._process = None
        if cache is None or not any(reader.any_goes_through_cache() for reader in readers):
            return
        # More than the cache holds would evict what it staged itself.
        plan = _Plan(readers, shards_of_step, first_step, num_steps, min(ahead_bytes, cache.limit_bytes // 2))
        self._process = multiprocessing.get_context("fork").Process(
            target=_stage, args=(plan, self._progress, os.getpid()), name="stager", daemon=True
        )
        self._process.start()
        atexit.register(self.close)  # before multiprocessing's own end, which sends the SIGTERM that it ignores

    @property
    def pid(self) -> int | None:
        """The process; None where nothing is to be staged."""
        return self._process.pid if self._process else None

    def consumed(self, step: int) -> None:
        """Tell that `step` has read all its samples."""
        self._progress[0] = step

    def close(self) -> None:
        """End the process; a download under way is abandoned and leaves nothing that hurts."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
            atexit.unregister(self.close)


class _Plan:
    """Which shards to stage next and which to keep, as the steps go by. Knows no cache."""

    def __init__(
        self,
        readers: Sequence[ShardReader],
        shards_of_step: ShardsOfStep,
        first_step: int,
        num_steps: int,
        ahead_bytes: int,
    ):
        self.readers = readers
        self._shards_of_step, self._num_steps, self._ahead_bytes = shards_of_step, num_steps, ahead_bytes
        self._next_step = first_step
        self._pending: list[tuple[int, int]] = []  # of the step that did not fit whole
        self._lies_near: dict[tuple[int, int], bool] = {}
        self._steps: dict[tuple[int, int], list[int]] = {}  # per shard the planned steps that use it, ascending
        self._unused_bytes = 0
        self._unused: list[tuple[int, int, int]] = []  # heap of (first step, source, shard)

    def advance(self, consumed: int) -> list[tuple[int, int]]:
        """Forget what steps up to `consumed` used; the shards to stage now, in order of first use."""
        while self._unused and self._unused[0][0] <= consumed:
            _, source, shard = heapq.heappop(self._unused)
            self._unused_bytes -= self.readers[source].shard_bytes(shard)
        for key, steps in list(self._steps.items()):
            while steps and steps[0] <= consumed:
                steps.pop(0)
            if not steps:
                del self._steps[key]
        if self._next_step <= consumed:  # the rank has overtaken us
            self._next_step, self._pending = consumed + 1, []
        wanted: list[tuple[int, int]] = []
        while self._next_step < min(self._num_steps, consumed + 1 + MOST_STEPS_AHEAD):
            self._pending = self._pending or self._far_shards(self._next_step)
            while self._pending and self._fits(self._pending[0]):
                key = self._pending.pop(0)
                if self._take(key, self._next_step):
                    wanted.append(key)
            if self._pending:
                break
            self._next_step += 1
        return wanted

    def needed(self) -> list[tuple[int, int]]:
        """Every shard of the look-ahead, the one that is used last first."""
        return sorted(self._steps, key=lambda key: self._steps[key][0], reverse=True)

    def _far_shards(self, step: int) -> list[tuple[int, int]]:
        keys = [(int(source), int(shard)) for source, shard in self._shards_of_step(step)]
        for source, shard in keys:
            if (source, shard) not in self._lies_near:
                self._lies_near[source, shard] = not self.readers[source].goes_through_cache(shard)
        return [key for key in dict.fromkeys(keys) if not self._lies_near[key]]

    def _fits(self, key: tuple[int, int]) -> bool:
        source, shard = key
        unused = self._unused_bytes
        return key in self._steps or not unused or unused + self.readers[source].shard_bytes(shard) <= self._ahead_bytes

    def _take(self, key: tuple[int, int], step: int) -> bool:
        if key in self._steps:
            self._steps[key].append(step)
            return False
        self._steps[key] = [step]
        self._unused_bytes += self.readers[key[0]].shard_bytes(key[1])
        heapq.heappush(self._unused, (step, *key))
        return True


def _stage(plan: _Plan, progress: memoryview, parent: int) -> None:
    serve_parent(parent)
    under_way: dict[tuple[int, int], Future] = {}
    renewed, consumed = time.monotonic(), None
    with ThreadPoolExecutor(DOWNLOADS) as downloads:
        while True:
            missing = []
            if time.monotonic() - renewed > RENEW_SECONDS:
                missing = [key for key in plan.needed() if not _is_staged(plan, key)]
                renewed = time.monotonic()
            if missing or progress[0] != consumed:
                consumed = progress[0]
                under_way = {key: future for key, future in under_way.items() if not future.done()}
                for key in [*plan.advance(consumed), *reversed(missing)]:
                    if key not in under_way:
                        under_way[key] = downloads.submit(_stage_one, plan.readers, key)
            time.sleep(POLL_SECONDS)


def _is_staged(plan: _Plan, key: tuple[int, int]) -> bool:
    source, shard = key
    return plan.readers[source].is_staged(shard)


def _stage_one(readers: Sequence[ShardReader], key: tuple[int, int]) -> None:
    source, shard = key
    try:
        readers[source].stage(shard)
    except Exception as error:
        log.info("not staged: %s", error)
