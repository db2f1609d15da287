"""From a measured value to a verdict in words, and from verdicts to whether a run is in bad health. Torch-free.

Alarms hold for any run and outrank bands. k-NN below its band alone makes no measurement bad: it puts masked
autoencoders far below what they are worth (arXiv:2111.06377, section 4.4).
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.config.health import HealthConfig
from pipeline.health.bands import METRICS, Bands
from pipeline.words import number_in_words

LATE = 0.5  # of the run, behind which, and behind a whole epoch, a model must have learned something
ALARM = "alarm"
NO_REFERENCE = "no reference"
Kind = Literal["ok", "low", "high", "no band"]


@dataclass(frozen=True)
class Moment:
    """Where a run is: after `step` steps."""

    step: int
    samples: int
    epoch: float
    progress: float  # 0 to 1, share of the run

    @property
    def is_late(self) -> bool:
        return self.progress >= LATE and self.epoch >= 1


@dataclass(frozen=True)
class Value:
    """What was measured of a metric. `note` says in words what a person must know of it; only what is `comparable` is
    held against a band."""

    metric: str
    value: float
    note: str = ""
    comparable: bool = True


@dataclass(frozen=True)
class Verdict:
    """One line of health.jsonl. `low` and `high` are the band, or the bound of an alarm; None where there is none."""

    step: int
    samples: int
    epoch: float
    progress: float
    metric: str
    value: float | None  # None: not a finite number
    low: float | None
    high: float | None
    basis: str
    verdict: Kind
    words: str

    def as_line(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def is_bad(self) -> bool:
        """Whether it alone makes a measurement bad."""
        if self.basis.startswith(ALARM):
            return True
        if self.metric == "attention_entropy":
            return self.verdict in ("low", "high")
        return self.verdict == "low" and self.metric != "knn_top1"

    @property
    def said(self) -> str:
        """The words without the epoch."""
        return self.words.partition(": ")[2]


def judge(measured: Value, moment: Moment, bands: Bands | None, config: HealthConfig) -> Verdict:
    """The verdict on a value: by an alarm, else by its band, else none."""
    alarm = _alarm(measured.metric, measured.value, moment, config)
    if alarm is not None:
        kind, low, high, what = alarm
        return _verdict(measured, moment, low, high, f"{ALARM}: {what}", kind, f"{kind.upper()}: {what}")
    band = bands.at(measured.metric, moment.progress) if bands is not None and measured.comparable else None
    if band is None:
        return _verdict(measured, moment, None, None, "", "no band", NO_REFERENCE)
    low, high = band
    kind = "low" if measured.value < low else "high" if measured.value > high else "ok"
    between = "–" if low >= 0 else " to "  # a dash would read as another sign
    expected = f"(expected {_number(low)}{between}{_number(high)}) {kind}"
    return _verdict(measured, moment, low, high, bands.basis, kind, expected)


def is_bad(verdicts: Iterable[Verdict]) -> bool:
    """Whether a measurement, all verdicts of one moment, is bad."""
    return any(one.is_bad for one in verdicts)


def in_one_line(verdicts: list[Verdict]) -> str:
    """What a person reads of a measurement: the epoch once, then each metric, and whether none has a reference."""
    said = "; ".join(one.said.removesuffix(f", {NO_REFERENCE}") for one in verdicts)
    lack = f" ({NO_REFERENCE})" if all(one.verdict == "no band" for one in verdicts) else ""
    return f"{_epoch(verdicts[0].epoch)}: {said}{lack}"


def bad_in_words(verdicts: Iterable[Verdict]) -> str:
    """Of a bad measurement, what is wrong."""
    return "; ".join(one.words for one in verdicts if one.is_bad)


def _verdict(
    measured: Value, moment: Moment, low: float | None, high: float | None, basis: str, kind: Kind, tail: str
) -> Verdict:  # fmt: skip
    finite = math.isfinite(measured.value)
    note = f" {measured.note}" if measured.note else ""
    words = f"{_epoch(moment.epoch)}: {METRICS[measured.metric]} {_number(measured.value)}{note}"
    words += f", {tail}" if kind == "no band" else f" {tail}"
    return Verdict(
        moment.step, moment.samples, moment.epoch, moment.progress, measured.metric,
        measured.value if finite else None, low, high, basis, kind, words,
    )  # fmt: skip


def _alarm(
    metric: str, value: float, moment: Moment, config: HealthConfig
) -> tuple[Kind, float | None, float | None, str] | None:
    """Kind, low, high and words of an alarm that holds for any run; None where nothing is alarming."""
    if not math.isfinite(value):
        return "low", None, None, "not a number, as weights or features are that are not finite"
    if moment.progress < config.settling:
        return None
    match metric:
        case "feature_spread" if value < config.least_spread:
            words = f"below {config.least_spread:g}: the features of all images are alike"
            return "low", config.least_spread, None, words
        case "rankme" if value < config.least_rank:
            return "low", config.least_rank, None, f"below {config.least_rank:g}: all features lie on one line"
        case "attention_entropy" if value < config.least_entropy:
            return "low", config.least_entropy, None, f"below {config.least_entropy:g}: every head looks at one token"
        case "attention_entropy" if value > config.most_entropy and moment.is_late:
            words = f"above {config.most_entropy:g}: no head looks anywhere in particular"
            return "high", None, config.most_entropy, words
        case "explained_variance" if value <= 0 and moment.is_late and config.mean_is_bad:
            return "low", 0.0, None, "0 or less: the mean of all patches predicts as well"
    return None


def _epoch(epoch: float) -> str:
    return f"epoch {epoch:.2f}".rstrip("0").rstrip(".")


def _number(value: float) -> str:
    """Two digits behind the point, as many as tell values near 0 or 1 from them, fewer of a large one."""
    if not math.isfinite(value):
        return "nan"
    if abs(value) >= 99.95:
        return number_in_words(abs(value)) if value > 0 else f"-{number_in_words(abs(value))}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if 0.01 <= abs(value) <= 0.99 or abs(value) >= 1.01 else f"{value:.4g}"
