"""What a person sees of a running job: one line per so many seconds, read from the ledger."""

import json
import time
from collections.abc import Callable
from typing import Any

from pipeline.config.stages import read_run_config
from pipeline.ingestion.build import IngestReport
from pipeline.ingestion.progress import INGESTING, Progress
from pipeline.loading.verdict import observed_verdict
from pipeline.progress import Position, read_position
from pipeline.run_directory import RunDirectory
from pipeline.supervision.nodes import positions_of
from pipeline.words import duration_in_words

LINE_SECONDS = 5.0
Say = Callable[[str], None]
START_PHASES = {"start": "loading the libraries", "data": "opening the data", "model": "making the model"}
SCORES = ("validation/loss", "validation/accuracy")


class LedgerTail:
    """Progress lines of one attempt, at most one per `line_seconds`, and the last step's always; events as they come.

    Until the first step is made it says what the ranks do instead, each time that changes. `latest` is the newest
    line of the ledger with figures, {} before the first.
    """

    def __init__(self, run: RunDirectory, attempt: int, line_seconds: float = LINE_SECONDS):
        self.attempt, self.line_seconds = run.attempt(attempt), line_seconds
        self.ledger = self.attempt.ledger
        self.run, self.plan = run, run.plan()
        self.last_step = self.plan.get("steps", {}).get("steps", 0)
        self.offset, self.shown_at, self.newest = 0, 0.0, None
        self.events_offset = 0
        self.latest: dict[str, Any] = {}
        self.began, self.start_words = time.monotonic(), ""

    def lines(self, *, last: bool = False) -> list[str]:
        return [*self._events(), *self._progress(last)]

    def _events(self) -> list[str]:
        """Checkpoints, roll-backs, warnings: what rank 0 wrote since it was last asked."""
        if not self.attempt.events.is_file():
            return []
        with open(self.attempt.events, "rb") as file:
            file.seek(self.events_offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.events_offset += len(whole)
        return whole.decode(errors="replace").splitlines()

    def _progress(self, last: bool) -> list[str]:
        self._read()
        if not self.offset and not last:
            return self._start_lines()
        if self.newest is None or not (last or time.monotonic() - self.shown_at >= self.line_seconds):
            return []
        self.shown_at, entry, self.newest = time.monotonic(), self.newest, None
        lines = [progress_line(entry, self.last_step)]
        return [*lines, self._supply_line(entry)] if last else lines

    def _start_lines(self) -> list[str]:
        """What the rank that is furthest behind does, of a training."""
        position = min(self._positions(), default=None) if self.last_step else None
        before = self.start_words
        if position is not None:
            first_step = "compiling, in the first step" if self.plan.get("compile_backend") else "making the first step"
            self.start_words = first_step if position.step >= 0 else START_PHASES.get(position.phase, before)
        if self.start_words == before:
            return []
        return [f"starting, {duration_in_words(time.monotonic() - self.began)}: {self.start_words}"]

    def _positions(self) -> list[Position]:
        """Of all ranks; those of several nodes write where only their supervisors see it, whose heartbeats tell."""
        files = [self.attempt.progress(rank) for rank in range(self.plan["ranks_per_node"])]
        return [*filter(None, map(read_position, files))] or positions_of(self.attempt)

    def _supply_line(self, entry: dict[str, Any]) -> str:
        """Whether the run was input-bound, at its last step, and what was damaged."""
        verdict = observed_verdict(
            entry["perf/loader_images_per_second"], entry["perf/images_per_second"], entry["perf/data_wait_share"],
            self.plan["loader_workers"], read_run_config(self.run.path),
        )  # fmt: skip
        prefix = "data/damaged_"
        damaged = {key.removeprefix(prefix): int(value) for key, value in entry.items() if key.startswith(prefix)}
        if not damaged:
            return verdict
        causes = ", ".join(f"{count} {cause}" for cause, count in damaged.items())
        return f"{verdict}; {sum(damaged.values())} damaged samples were replaced: {causes}"

    def _read(self) -> None:
        if not self.ledger.is_file() or self.ledger.stat().st_size == self.offset:
            return
        with open(self.ledger, "rb") as file:
            file.seek(self.offset)
            content = file.read()
        end = content.rfind(b"\n") + 1
        self.offset += end
        if end:
            lines = map(json.loads, reversed(content[:end].splitlines()))
            self.newest = next((line for line in lines if "perf/images_per_second" in line), self.newest)
            self.latest = self.newest or self.latest


def progress_line(entry: dict[str, Any], last_step: int) -> str:
    """`step 40/600  loss 1.2345  812.3 images/s  data wait 3 %  1 min 12 s left`"""
    mfu = f"  MFU {100 * entry['perf/mfu']:.1f} %" if "perf/mfu" in entry else ""
    scores = "".join(f"  {key.replace('/', ' ')} {value:.4f}" for key, value in entry.items() if key in SCORES)
    return (
        f"step {entry['step']}/{last_step}  loss {entry.get('train/loss', float('nan')):.4f}  "
        f"{entry['perf/images_per_second']:.1f} images/s{mfu}  data wait {100 * entry['perf/data_wait_share']:.0f} %  "
        f"{duration_in_words(entry.get('perf/seconds_left', 0))} left{scores}"
    )


def ingest_progress(report: Say) -> Progress:
    """A progress callback for `ingest` that reports at most one line per `LINE_SECONDS`."""
    started = shown_at = time.monotonic()
    kept: dict[str, int] = {}  # of each that is counted, what was done before its first call

    def show(done: int, total: int, rejected: int, what: str = INGESTING) -> None:
        nonlocal shown_at, started
        now = time.monotonic()
        if what not in kept:
            kept[what], started, shown_at = done, now, now
        if now - shown_at >= LINE_SECONDS:
            shown_at = now
            speed = (done - kept[what]) / (now - started)
            left = f"  {(total - done) / speed:,.0f} s left" if speed else ""
            images = f" images  {speed:,.0f} images/s  {rejected:,} rejected" if what == INGESTING else f", {what}"
            report(f"{done:,} of {total:,}{images}{left}")

    return show


TARS_IN_WORDS = {
    "adopt": "tars adopted where they lie",
    "rewrite": "WebDataset tars written anew",
    "archive": "tars read as folders of images",
}


def ingest_words(made: IngestReport) -> str:
    """What an ingestion did, in one line."""
    tars = f"; {TARS_IN_WORDS[made.tars]} (tars={made.tars})" if made.tars else ""
    splits = ", ".join(f"{count:,} {split}" for split, count in made.samples.items())
    lost = {reason: count for reason, count in made.rejected.items() if reason != "read_as_labels"}
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in lost.items()) or "none"
    annotated = "".join(
        f", {count} of {what}" for what, count in (("masks", made.num_mask_classes), ("boxes", made.num_box_classes))
        if count is not None
    )  # fmt: skip
    unlabelled = f", {made.num_unlabelled:,} without a label" if made.num_unlabelled else ""
    return (
        f"{made.directory}: {splits}; {made.num_classes} class{'es' * (made.num_classes != 1)}"
        f"{unlabelled}{annotated}; not taken: {rejected}; "
        f"{made.shards_written} shards written, {made.shards_kept} kept{tars}; fingerprint {made.fingerprint[:12]}"
    )


def certificate_words(made: IngestReport) -> str:
    """The verdict on a dataset and where its certificate is, in one line; leaks, where there are any, come first."""
    return f"{_leak_words(made)}certificate {made.certificate}: {made.verdict}"


def certificate_lines(made: IngestReport) -> list[str]:
    """The same for a terminal: where there are several findings, a line each."""
    if len(made.findings) < 2:
        return [certificate_words(made)]
    head = f"{_leak_words(made)}certificate {made.certificate}: {len(made.findings)} findings"
    return [head, *(f"  {finding}" for finding in made.findings)]


def _leak_words(made: IngestReport) -> str:
    if not made.num_leaking:
        return ""
    images = "1 image leaks" if made.num_leaking == 1 else f"{made.num_leaking:,} images leak"
    return f"{images}, into splits or datasets that models are judged on; "
