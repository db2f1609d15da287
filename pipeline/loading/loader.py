"""Micro-batches of one rank, made ahead of use by worker processes in shared memory.

The memory is a ring of micro-batches, mapped anonymously before the workers are forked: no file of it is ever in
/dev/shm, so a small /dev/shm does not limit it and nothing is left there when the processes are killed. A ticket says
which rows of which micro-batch to fill; what goes there is a pure function of the position, so neither the number of
workers nor who does what changes a batch.
"""

import math
import mmap
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.objectives.batch import Batch
from pipeline.config.plan import BatchPlan
from pipeline.loading.stream import Damaged, SampleStream
from pipeline.loading.workers import Workers
from pipeline.shards.order import positions_of_rank

CHUNK = 32  # most rows per ticket: about 30 ms of work


class RawBatch(NamedTuple):
    """One micro-batch on the host. `images` is overwritten once the next batch is drawn: copy it before."""

    images: Tensor  # (B, H, W, C) uint8, or float32 in 0..1
    labels: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64
    keys: list[str]
    damaged: list[Damaged]


class _Done(NamedTuple):
    """What comes of one ticket, beside the rows that it filled."""

    labels: np.ndarray
    keys: list[str]
    damaged: list[Damaged]
    seconds: float


class Loader:
    """Iterates the RawBatches of steps [first_step, last_step) of one rank; a context manager that ends its workers.

    With no workers the batches are made when they are asked for. Raises what a worker raised: DataError for damaged
    data; FaultError where a worker was killed.
    """

    def __init__(
        self, stream: SampleStream, plan: BatchPlan, *, rank: int, first_step: int, last_step: int, workers: int,
        skipped: Sequence[tuple[int, int]] = (), ranks_per_node: int = 1,
    ):  # fmt: skip
        self.stream, self.plan, self.rank = stream, plan, rank
        self.last_step, self.num_workers, self.ranks_per_node = last_step, workers, ranks_per_node
        rows = plan.micro_batch_size
        self.chunk = min(CHUNK, math.ceil(rows / max(1, workers)))
        self.chunks = math.ceil(rows / self.chunk)  # tickets per micro-batch
        # What the consumer holds or is copying, and work for every worker twice over.
        self.slots = 2 + max(2, math.ceil(2 * workers * self.chunk / rows)) if workers else 1
        self.ring = _shared_array((self.slots, rows, *stream.image_shape), stream.dtype)
        self._pinned = False
        self.images_made, self.busy_seconds = 0, 0.0
        self._begin(first_step, skipped)

    def _begin(self, first_step: int, skipped: Sequence[tuple[int, int]]) -> None:
        self.first_step, self.skipped = first_step, skipped
        self.num_batches = (self.last_step - first_step) * self.plan.gradient_accumulation_steps
        self.stager = self.stream.stager(
            self.positions_of_step, range(first_step, self.last_step), self.plan.world_size, self.ranks_per_node
        )
        self.workers = Workers(self.fill, self.num_workers) if self.num_workers else None
        self._batches = self._iterate()

    def begin_again(self, first_step: int, skipped: Sequence[tuple[int, int]]) -> None:
        """Go on at `first_step` instead, passing over `skipped`, with new workers."""
        self.close()
        self._begin(first_step, skipped)

    def __iter__(self) -> Iterator[RawBatch]:
        return self

    def __next__(self) -> RawBatch:
        return next(self._batches)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *failure: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the workers at once."""
        self.stager.close()
        if self.workers is not None:
            self.workers.close()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.ring.ctypes.data)
            self._pinned = False

    def positions(self, batch: int) -> np.ndarray:
        """(B,) int64 positions of this rank's `batch`-th micro-batch from `first_step` on."""
        step, micro_step = divmod(batch, self.plan.gradient_accumulation_steps)
        of_step = self.positions_of_step(self.first_step + step)
        return of_step[micro_step * self.plan.micro_batch_size :][: self.plan.micro_batch_size]

    def positions_of_step(self, step: int) -> np.ndarray:
        return positions_of_rank(self.plan.global_batch_size, step, self.rank, self.plan.world_size, self.skipped)

    @property
    def images_per_second(self) -> float | None:
        """What all workers together make when none has to wait; None before the first batch."""
        if not self.busy_seconds:
            return None
        return self.images_made / self.busy_seconds * max(1, self.workers.count if self.workers else 1)

    def fill(self, ticket: int) -> _Done:
        """Fill the rows that a ticket stands for."""
        started = time.perf_counter()
        batch, chunk = divmod(ticket, self.chunks)
        rows = slice(chunk * self.chunk, (chunk + 1) * self.chunk)
        positions = self.positions(batch)[rows]
        labels = np.empty(len(positions), np.int64)
        keys, damaged = self.stream.fill(positions, self.ring[batch % self.slots][rows], labels)
        return _Done(labels, keys, damaged, time.perf_counter() - started)

    def _iterate(self) -> Iterator[RawBatch]:
        if self.workers is None:
            for batch in range(self.num_batches):
                _finish(_copies_issued())
                yield self._assemble(batch, [self.fill(batch * self.chunks + chunk) for chunk in range(self.chunks)])
            return
        self._hand_out(range(min(self.slots, self.num_batches)))
        copying: deque[Any] = deque()  # of the oldest slots: events after which they may be written again
        for batch in range(self.num_batches):
            yield self._assemble(batch, self.workers.collect(self._tickets_of(batch)))
            copying.append(_copies_issued())
            while copying and (len(copying) > 1 or copying[0] is None or copying[0].query()):
                _finish(copying.popleft())
                following = batch - len(copying) + self.slots
                self._hand_out(range(following, min(following + 1, self.num_batches)))

    def _hand_out(self, batches: range) -> None:
        for batch in batches:
            self.workers.hand_out(self._tickets_of(batch))

    def _tickets_of(self, batch: int) -> range:
        return range(batch * self.chunks, (batch + 1) * self.chunks)

    def _assemble(self, batch: int, done: list[_Done]) -> RawBatch:
        self._pin()
        self.stager.consumed(self.first_step + (batch + 1) // self.plan.gradient_accumulation_steps - 1)
        self.images_made += self.plan.micro_batch_size
        self.busy_seconds += sum(part.seconds for part in done)
        return RawBatch(
            torch.from_numpy(self.ring[batch % self.slots]),
            torch.from_numpy(np.concatenate([part.labels for part in done])),
            torch.from_numpy(self.positions(batch)),
            [key for part in done for key in part.keys],
            [one for part in done for one in part.damaged],
        )

    def _pin(self) -> None:
        """Page-lock the ring for copies to an accelerator; after the fork, as workers must not hold a CUDA context."""
        if self._pinned or not _has_cuda():
            return
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.ring.ctypes.data, self.ring.nbytes, 0))
        self._pinned = True


def to_device(
    raw: RawBatch, device: torch.device, mean: tuple[float, ...], deviation: tuple[float, ...], dtype: torch.dtype
) -> Batch:
    """The batch on the device, channels first, uint8 0..255 scaled to 0..1, normalised, and then rounded to `dtype`."""
    images = raw.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    images = images.float().div_(255) if raw.images.dtype == torch.uint8 else images
    images = ((images - _channels(mean, device)) / _channels(deviation, device)).to(dtype).contiguous()
    return Batch(images, raw.labels.to(device, non_blocking=True), raw.positions.to(device, non_blocking=True))


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, C, 1, 1) on the device, once: to bring them there it would wait for the batch before."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


@cache
def _has_cuda() -> bool:
    """Asked behind the fork, and once: torch looks for the driver's library each time, which takes 0.2 ms."""
    return torch.cuda.is_available()


def _copies_issued() -> Any:
    """An event behind all copies to the accelerator issued so far; None without one."""
    return torch.cuda.current_stream().record_event() if _has_cuda() else None


def _finish(copies: Any) -> None:
    if copies is not None:
        copies.synchronize()


def _shared_array(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that forked processes share."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)
