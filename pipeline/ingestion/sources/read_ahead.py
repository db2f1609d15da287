"""How a job reads files from behind a URL: the next ones are on their way while one is worked on.

What `memory://` holds is in this process alone, so there a job carries its files' bytes along.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.ingestion.sources.listing import Listing, Source
from pipeline.shards.decoding import ImageFault
from pipeline.storage.location import Location, Url

IN_FLIGHT = 8  # requests of a worker at once, where files are small
MOST_SKIPPED = 4  # files, for one after the other to be meant; who reads here and there is not read ahead for
AHEAD_BYTES = 64 << 20  # held beside the file that is worked on, as far as the greatest one so far tells


def sent_ahead(source: Source, paths: Sequence[str], where: Sequence[Location]) -> Source:
    """`source`, as a job is to read `paths`, in this order; `where` is all that it reads."""
    if any(str(each).startswith("memory://") for each in where):
        return Carried(source, tuple(paths))
    return ReadAhead(source, tuple(paths)) if any(isinstance(each, Url) for each in where) else source


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
        self._greatest, self._last = 1, -1

    def read(self, path: str) -> bytes:
        here = self.places[path]
        with self._lock:
            in_turn = 0 < here - self._last <= MOST_SKIPPED
            self._last = here
            beyond = here + max(1, min(IN_FLIGHT, AHEAD_BYTES // self._greatest) if in_turn else 1)
            for place in [place for place in self._reads if not here <= place < here + IN_FLIGHT]:
                self._reads.pop(place).cancel()
            for place in range(here, min(beyond, len(self._paths))):
                if place not in self._reads:
                    self._reads[place] = self._threads.submit(self._source.read, self._paths[place])
            wanted = self._reads.pop(here)
        content = wanted.result()
        self._greatest = max(self._greatest, len(content))
        return content


@dataclass(frozen=True)
class Carried:
    """`source`; where it is pickled, `paths` go along as they are then."""

    source: Source
    paths: tuple[str, ...]

    def list_files(self) -> Listing:
        return self.source.list_files()

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        return self.source.read(path, num_bytes)

    def __reduce__(self) -> tuple:
        return HeldFiles, ({path: self._content(path) for path in self.paths},)

    def _content(self, path: str) -> bytes | OSError | ImageFault:
        try:
            return self.source.read(path)
        except (OSError, ImageFault) as fault:
            return fault


@dataclass(frozen=True)
class HeldFiles:
    """Files, by path, or why they could not be read."""

    contents: Mapping[str, bytes | OSError | ImageFault]

    def list_files(self) -> Listing:
        raise NotImplementedError("what a job carries along is not listed")

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        content = self.contents[path]
        if isinstance(content, Exception):
            raise content
        return content if num_bytes < 0 else content[:num_bytes]
