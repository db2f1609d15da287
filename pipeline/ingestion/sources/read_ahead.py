"""Reads the next files of a job while one is worked on: behind a URL a read is mostly waiting."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.ingestion.sources.listing import Listing, Source

IN_FLIGHT = 8  # files; what a worker holds in memory beside the one it decodes


@dataclass(frozen=True)
class ReadAhead:
    """`source`, most of whose reads will be of `paths`, in this order."""

    source: Source
    paths: tuple[str, ...]

    def list_files(self) -> Listing:
        return self.source.list_files()

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        if num_bytes >= 0 or path not in self._flight.places:
            return self.source.read(path, num_bytes)
        return self._flight.read(path)

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "paths": self.paths}

    @cached_property
    def _flight(self) -> "_Flight":
        return _Flight(self.source, self.paths)


class _Flight:
    def __init__(self, source: Source, paths: Sequence[str]):
        self.places = {path: place for place, path in enumerate(paths)}
        self._source, self._paths = source, paths
        self._threads = ThreadPoolExecutor(IN_FLIGHT)
        self._reads: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()

    def read(self, path: str) -> bytes:
        here = self.places[path]
        with self._lock:
            for place in [place for place in self._reads if not here <= place < here + IN_FLIGHT]:
                self._reads.pop(place).cancel()
            for place in range(here, min(here + IN_FLIGHT, len(self._paths))):
                if place not in self._reads:
                    self._reads[place] = self._threads.submit(self._source.read, self._paths[place])
            wanted = self._reads.pop(here)
        return wanted.result()
