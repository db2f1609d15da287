"""A trace of chosen steps, and what each rank gave to collectives in them: files of the attempt, in `profile/`.

`rank-00000.json.gz` opens in chrome://tracing or ui.perfetto.dev. `rank-00000.communication.tsv` has a row per
operation, type and size: bytes that this rank puts in, per call, and calls and bytes per step. An operation bears the
name of what ran: gloo does a reduce-scatter by an all-reduce.
"""

import gzip
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.profiling import ProfilingConfig
from pipeline.rank import Rank

COLLECTIVE = re.compile(r"(?:gloo|nccl):_?(\w+)")
ELEMENT_BYTES = {
    "double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "unsigned char": 1, "bool": 1,
}  # fmt: skip
log = logging.getLogger(__name__)


class StepTrace:
    """Traces the steps that `profiling.steps` names. Every rank traces itself.

    A context manager: where the steps end before the last to trace, those that were made are written.
    """

    def __init__(self, me: Rank, config: ProfilingConfig):
        self.me, self.steps = me, config.steps
        self._profile: profile | None = None
        self._first = self._done = 0

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._profile is not None and self._done >= self._first:
            self._write()

    def before(self, step: int) -> None:
        """To be called before the step that the log will call `step`."""
        if self._profile is None and self.steps[0] <= step <= self.steps[1]:
            if not torch.cuda.is_available():  # Kineto calls it an error that there is no GPU, at any level below this
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile, self._first = profile(activities=activities, record_shapes=True), step
            self._profile.start()

    def after(self, step: int, last: int) -> None:
        """Write the files once the last step to trace is done, or the run's `last`."""
        self._done = step
        if self._profile is not None and step >= min(self.steps[1], last):
            self._write()

    def _write(self) -> None:
        self._profile.stop()
        folder = self.me.attempt.path / "profile"
        folder.mkdir(exist_ok=True)
        trace = folder / f"rank-{self.me.rank:05d}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        with gzip.open(trace) as file:
            exchanged = communication(json.load(file)["traceEvents"], self._done + 1 - self._first)
        write_communication(folder / f"rank-{self.me.rank:05d}.communication.tsv", exchanged)
        self._profile, self.steps = None, None
        if self.me.is_first:
            log.info("traced steps %d to %d: %s", self._first, self._done, folder)


class Exchange(NamedTuple):
    """One kind of collective call of this rank."""

    operation: str
    element: str  # type of an element
    bytes: int  # that this rank puts into one call
    calls_per_step: float

    @property
    def bytes_per_step(self) -> float:
        return self.bytes * self.calls_per_step


def communication(events: Iterable[Mapping[str, Any]], steps: int) -> list[Exchange]:
    """The collectives among the events of a trace of so many steps, the largest first."""
    calls: Counter[tuple[str, str, int]] = Counter()
    for event in events:
        named, shown = COLLECTIVE.fullmatch(event.get("name", "")), event.get("args", {})
        if not named or "Input Dims" not in shown:  # a device's own event has no inputs
            continue
        inputs = list(zip(shown["Input type"], shown["Input Dims"], strict=True))
        size = sum(ELEMENT_BYTES.get(kind, 0) * torch.Size(shape).numel() for kind, shape in inputs)
        calls[named[1], inputs[0][0] if inputs else "", size] += 1
    found = [Exchange(*kind, count / steps) for kind, count in calls.items()]
    return sorted(found, key=lambda exchange: -exchange.bytes_per_step)


def write_communication(path: Path, exchanged: Iterable[Exchange]) -> None:
    rows = [f"{e.operation}\t{e.element}\t{e.bytes}\t{e.calls_per_step:g}\t{e.bytes_per_step:.0f}" for e in exchanged]
    path.write_text("\n".join(["operation\telement\tbytes\tcalls_per_step\tbytes_per_step", *rows]) + "\n")
