"""Where the time of a step goes, without a synchronisation of its own.

On an accelerator the marks are events of the compute stream, read behind the step's own synchronisation; elsewhere
they are readings of the processor's clock.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "update")
Marks = list[tuple[str, Any]]  # (part, reading as it began), and ("", reading) as the last one ended


class StepClock:
    """Seconds of one step by part: `begin(part)` ends the part before it.

    `data` is drawing a batch and bringing it to the device, `update` clipping, the optimizer and what ranks exchange
    behind the last backward. `enter` is told of each part, for whoever watches from outside.
    """

    def __init__(self, device: torch.device, enter: Callable[[str], None]):
        self._enter = enter
        self._on_device = device.type == "cuda"
        self._now: Callable[[], Any] = _event if self._on_device else time.perf_counter
        self._marks: Marks = []

    def begin(self, part: str) -> None:
        self._enter(part)
        self._marks.append((part, self._now()))

    def end(self) -> None:
        """The step is over, and the device has done all of its work."""
        self._enter("train")
        ended = self._now()
        self._marks.append(("", ended))
        if self._on_device:
            ended.synchronize()  # nothing is queued before it any more

    def take(self) -> Marks:
        """Of the parts between the last call and the last `end`, for `seconds_by_part`."""
        marks, self._marks = self._marks, []
        return marks


def seconds_by_part(marks: Marks) -> dict[str, float]:
    """Of each of PARTS, 0 where it was not begun. The device must have done the work."""
    spent = dict.fromkeys(PARTS, 0.0)
    for (part, began), (_, ended) in pairwise(marks):
        if part:
            spent[part] += ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000
    return spent


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
