"""This rank's part of a training state, on its way to a file while training goes on.

The state changes only when the optimizer steps, so it can be copied beside the forward and backward of the next step:
`take` begins the copy, and `hold` waits for what is left of it before anything changes the state.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.files import fragments_header, rank_file, write_parts
from pipeline.checkpoints.fragments import TrainingState


class Snapshot:
    """The fragments of one rank, in host memory as they lie in its file, used for every save.

    The memory is allocated and touched once, here: a copy into fresh memory takes ten times as long. With CUDA it is
    pinned, and the copy has a stream of its own. Under plain data parallel every rank holds all fragments and takes a
    part of them.
    """

    def __init__(self, state: TrainingState, rank: int, world_size: int):
        self.state, self.rank, self.world_size = state, rank, world_size
        fragments = state.fragments if state.stage else state.fragments[rank::world_size]
        self._places = [(fragment, kind) for fragment in fragments for kind in state.tensors()]
        counts = {f"{fragment.name}@{fragment.start}@{kind}": fragment.count for fragment, kind in self._places}
        counts = counts or {"@empty": 1}
        self._header = fragments_header(counts)
        on_cuda = torch.cuda.is_available()
        self._buffer = torch.zeros(sum(counts.values()), pin_memory=on_cuda)
        self._stream = torch.cuda.Stream() if on_cuda else None
        self._thread = None if on_cuda else ThreadPoolExecutor(1, "snapshot")
        self._copy: Future | torch.cuda.Event | None = None  # the last one begun
        self._held = True  # nothing need wait for it any more
        self._wait: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # of the device, before and after
        self._waited = 0.0  # by the host
        self._content = [self._copied()]

    def take(self) -> None:
        """Begin to copy the state as it is now."""
        self._forget_last()
        self._content = [self._copied()]
        self._held = False
        if self._stream is None:
            self._copy = self._thread.submit(self._copy_on_host)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy_from_device()
            self._copy = self._stream.record_event()

    def lend(self) -> None:
        """Take the state from where it lies, where that is host memory: it must not change until it is written."""
        if self._stream is not None or not self._places:
            return self.take()
        self._forget_last()
        self._content = [memoryview(source.numpy()).cast("B") for _, source in self._sources()]

    def _forget_last(self) -> None:
        self.hold()
        self._copy, self._wait, self._waited = None, None, 0.0

    def _copied(self) -> memoryview:
        return memoryview(self._buffer.numpy()).cast("B")

    def hold(self) -> None:
        """Keep the state from changing until the copy is through: on a device its stream waits, and not the host."""
        if self._held:
            return
        self._held = True
        if self._stream is None:
            started = time.perf_counter()
            self._copy.result()
            self._waited = time.perf_counter() - started
            return
        stream = torch.cuda.current_stream()
        before = stream.record_event(torch.cuda.Event(enable_timing=True))
        stream.wait_event(self._copy)
        self._wait = before, stream.record_event(torch.cuda.Event(enable_timing=True))

    def seconds_waited(self) -> float:
        """How long `hold` kept the state from changing; once it has been written."""
        if self._wait is None:
            return self._waited
        before, after = self._wait
        after.synchronize()
        return before.elapsed_time(after) / 1000

    def write(self, directory: Path) -> dict[str, dict[str, Any]]:
        """The file of this rank, when the copy is through, and its entry for the manifest. FaultError."""
        if self._copy is not None:
            self._copy.result() if self._stream is None else self._copy.synchronize()
        return write_parts(directory / rank_file(self.rank, self.world_size), [self._header, *self._content])

    @torch.no_grad()
    def _sources(self) -> Iterator[tuple[slice, Tensor]]:
        """Every place of the file, and the part of the state that belongs there."""
        tensors, end = self.state.tensors(), 0
        for fragment, kind in self._places:
            start, end = end, end + fragment.count
            yield slice(start, end), tensors[kind][fragment.flat].narrow(0, fragment.offset, fragment.count)

    def _copy_on_host(self) -> None:
        """By numpy, with one processor: torch would open a pool of threads of its own beside the one that trains."""
        target = self._buffer.numpy()
        for place, source in self._sources():
            target[place] = source.numpy()

    def _copy_from_device(self) -> None:
        for place, source in self._sources():
            self._buffer[place].copy_(source, non_blocking=True)
