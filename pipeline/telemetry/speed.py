"""How fast a run is: images per second, where the seconds of a step go, and the share of the device's peak it uses."""

import resource
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pipeline.telemetry.clock import Marks, seconds_by_part

# Dense matrix products in bf16 with fp32 sums, FLOP/s, by words of the device's name; the first that fits counts.
# From NVIDIA's data sheets, the figures with sparsity halved.
PEAKS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def peak_of_device(precision: str) -> float | None:
    """FLOP/s of this rank's device at most; None where it is unknown: no figure is better than a made-up one."""
    if not torch.cuda.is_available() or precision == "fp32":
        return None
    return peak_of_name(torch.cuda.get_device_name())


def peak_of_name(name: str) -> float | None:
    """FLOP/s of a device by the name that its driver gives, in 16-bit precision."""
    spaced = f" {name.replace('-', ' ')} "
    return next((peak for words, peak in PEAKS.items() if f" {words} " in spaced), None)


class _Step(NamedTuple):
    """Seconds of one step."""

    whole: float
    before: float  # since the end of the step before it
    waited: float  # for the loader
    data: float
    forward: float
    backward: float
    update: float


class SpeedMeter:
    """Speeds over the last `window` steps of a run of `last_step` steps.

    It keeps readings, and makes seconds of them when it is asked for means: a step then costs next to nothing.
    """

    def __init__(self, plan: Mapping[str, Any], last_step: int, window: int = 20):
        batches = plan["batches"]
        self.images_per_step, self.ranks, self.last_step = (
            batches["global_batch_size"],
            batches["world_size"],
            last_step,
        )
        self.flops_per_image, self.peak = plan["training_flops_per_image"], peak_of_device(plan["precision"])
        self._recent: deque[tuple[float, float, float, Marks]] = deque(maxlen=window)  # the last makes four of `_Step`
        self._steps, self._between = 0, 0.0  # all of them, and all seconds that were not of a step
        self._began = self.ended = 0.0  # by `time.perf_counter`
        self.last_seconds = 0.0  # of the step that has just ended

    def begin(self, now: float | None = None) -> None:
        """A step begins `now`, or as this is called."""
        self._began = time.perf_counter() if now is None else now

    def end(self, waited: float, marks: Marks, now: float | None = None) -> None:
        """It is over; what comes before the next one begins is between steps: validation, checkpoints, reporting.

        `waited` are its seconds of waiting for the loader, `marks` its readings of StepClock.
        """
        now = time.perf_counter() if now is None else now
        before, self.last_seconds = self._began - (self.ended or self._began), now - self._began
        self.ended, self._steps, self._between = now, self._steps + 1, self._between + before
        self._recent.append((self.last_seconds, before, waited, marks))

    def own_seconds(self, steps: int) -> float:
        """This rank's own time per step until it meets the others, mean of the last `steps`, or of the window."""
        last = self._steps_of_window()[-steps:]
        return sum(step.data + step.forward for step in last) / len(last)

    def means(self) -> _Step:
        return _Step(*(sum(column) / len(self._recent) for column in zip(*self._steps_of_window(), strict=True)))

    def _steps_of_window(self) -> list[_Step]:
        return [_Step(whole, before, waited, **seconds_by_part(marks)) for whole, before, waited, marks in self._recent]

    def figures(self, step: int) -> dict[str, float]:
        """For the ledger, means over the window. `perf/mfu` only where the device's peak is known.

        `step_seconds` is the step alone, from asking for its batch to the end of its update, and the parts make it up;
        `between_steps_seconds` is what went by since the step before: validation, checkpoints, reporting. Images per
        second, MFU and the share of waiting are of both together: of the time that passes. Validations and checkpoints
        may be further apart than the window is long, so the seconds left take the time between steps from the whole
        attempt.
        """
        mean = self.means()
        passed = mean.whole + mean.before or 1e-9
        speed = self.images_per_step / passed
        figures = {
            "perf/images_per_second": round(speed, 2),
            "perf/step_seconds": round(mean.whole, 4),
            "perf/between_steps_seconds": round(mean.before, 5),
            "perf/peak_memory_bytes": peak_memory_bytes(),
            "perf/data_wait_share": round(mean.waited / passed, 4),
            "perf/seconds_left": round((self.last_step - step) * (mean.whole + self._between / self._steps), 1),
            "perf/data_seconds": round(mean.data, 5),
            "perf/forward_seconds": round(mean.forward, 5),
            "perf/backward_seconds": round(mean.backward, 5),
            "perf/update_seconds": round(mean.update, 5),
        }
        if self.peak is not None:
            figures["perf/mfu"] = round(speed * self.flops_per_image / (self.ranks * self.peak), 4)
        return figures


def peak_memory_bytes() -> int:
    """The most memory this rank has held: of its accelerator, or resident in the process where it has none."""
    if torch.cuda.is_initialized():  # not `is_available`, which looks for the driver each time: 0.2 ms
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
