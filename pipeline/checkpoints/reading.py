"""Many parts of files into the memory where they belong: what lies together by one call, by several threads."""

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

from torch import Tensor, empty

READERS = 4  # threads: more than one stream is what a disk, a file server and memory are fast at
RUN_BYTES = 8 << 20  # of a call: so many that calls cost nothing, so few that threads end together
MOST_BUFFERS = 1024  # of a call, by Linux


class Part(NamedTuple):
    """What fills `target`, one-dimensional contiguous fp32, from byte `offset` of a file on; and `copy` from it, while
    it is warm, in that tensor's own precision."""

    file: io.FileIO
    offset: int
    target: Tensor
    copy: Tensor | None = None

    @property
    def end(self) -> int:
        return self.offset + self.target.nbytes


def read_parts(parts: Iterable[Part]) -> None:
    """Fill every target. Parts are asked for while others are read; in the order of their file they need few calls."""
    runs, turn = _runs(parts), Lock()

    def read_all() -> None:
        while True:
            with turn:
                run = next(runs, None)
            if run is None:
                return
            _read(run)

    with ThreadPoolExecutor(READERS, "read") as readers:
        for reader in [readers.submit(read_all) for _ in range(READERS)]:
            reader.result()


def _runs(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts that lie one behind the other in a file, together as long as a call should be."""
    run: list[Part] = []
    for part in _divided(parts):
        follows = run and run[-1].file is part.file and run[-1].end == part.offset
        if run and not (follows and part.end - run[0].offset <= RUN_BYTES and len(run) < MOST_BUFFERS):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _divided(parts: Iterable[Part]) -> Iterator[Part]:
    """The same, none larger than a call should be."""
    for part in parts:
        if part.target.nbytes <= RUN_BYTES:
            yield part
            continue
        size, offset = RUN_BYTES // part.target.element_size(), part.offset
        targets = part.target.split(size)
        copies = [None] * len(targets) if part.copy is None else part.copy.split(size)
        for target, copy in zip(targets, copies, strict=True):
            yield Part(part.file, offset, target, copy)
            offset += target.nbytes


def _read(run: list[Part]) -> None:
    """Straight to where it belongs, if on the host."""
    hosts = [part.target if part.target.device.type == "cpu" else empty(part.target.shape) for part in run]
    buffers = deque(memoryview(host.detach().numpy()).cast("B") for host in hosts)
    file, offset = run[0].file, run[0].offset
    while buffers:
        read = os.preadv(file.fileno(), buffers, offset)
        assert read, f"{file.name}: ends at byte {offset}"
        offset += read
        while buffers and read >= len(buffers[0]):
            read -= len(buffers.popleft())
        if read:
            buffers[0] = buffers[0][read:]
    for part, host in zip(run, hosts, strict=True):
        if host is not part.target:
            part.target.copy_(host)
        if part.copy is not None:
            _copy(part.copy, part.target)


def _copy(to: Tensor, source: Tensor) -> None:
    """By numpy where it can: torch would open a pool of threads of its own in each of these."""
    if to.dtype == source.dtype and to.device.type == source.device.type == "cpu":
        to.detach().numpy()[:] = source.detach().numpy()
    else:
        to.detach().copy_(source)
