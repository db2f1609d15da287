"""Raw images -> dataset directory, whatever number of workers, however often it is killed on the way.

Every shard is made from its own fixed list of files by one job; the journal remembers finished ones; the index comes
last. So a re-run makes only the shards whose files changed or that are not there, and gives the same bytes.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.annotations import mask_class_names
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.journal import Journal, check_destination, open_journal
from pipeline.ingestion.plan import IngestPlan, identify, num_workers, plan_ingest
from pipeline.ingestion.rejected import UNCOUNTED, Rejected, num_counted, reasons, rejected_lines
from pipeline.ingestion.shard_jobs import ShardJob, ShardSummary
from pipeline.ingestion.sources.digits import DIGITS
from pipeline.ingestion.sources.opening import source_name
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.atomic import sync_directory, write_file
from pipeline.shards.fingerprint import dataset_fingerprint
from pipeline.shards.index import INDEX_NAME, SPLITS, DatasetIndex, table_name, write_index
from pipeline.shards.parallel import in_processes
from pipeline.storage.location import is_url, location

REJECTED_NAME = "rejected.jsonl"

Progress = Callable[[int, int], None]  # (files done, files in all)


class IngestError(Exception):
    """The images themselves are the trouble: too many were rejected, or a worker died of one. Nothing was published."""


@dataclass(frozen=True)
class IngestReport:
    """What `ingest` did, for a person or a log."""

    directory: Path
    fingerprint: str
    samples: dict[str, int]  # by split
    num_classes: int
    rejected: dict[str, int]  # by reason
    shards_written: int
    shards_kept: int  # from an earlier run
    num_mask_classes: int | None = None  # None: without masks
    num_box_classes: int | None = None
    tars: str | None = None  # adopt, rewrite or archive: what was done with them


def ingest(
    source: str, destination: str | Path, config: IngestConfig, progress: Progress | None = None
) -> IngestReport:
    """Make the dataset `destination` from `source`, or finish it.

    InputError: wrong source, labels, splits or destination; nothing was written. IngestError: see there; what was
    finished stays, so a later run goes on from it. FaultError: a store behind a URL does not answer; run it again.
    """
    directory = _local(destination)
    _check_apart(source, directory)
    check_destination(directory, identify(source, config))
    with Scratch(directory) as scratch:
        return _ingest(source, directory, config, progress, scratch)


def _ingest(
    source: str, destination: Path, config: IngestConfig, progress: Progress | None, scratch: Scratch
) -> IngestReport:
    plan = plan_ingest(source, config, scratch)
    check_destination(destination, plan.identity)
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{destination}: cannot be made ({error.strerror})") from None
    with open_journal(destination, plan.identity) as journal:
        summaries, num_written = _run_jobs(plan, destination, journal, config, progress or (lambda done, total: None))
        rejected = [*plan.rejected, *(entry for summary in summaries for entry in summary.rejected)]
        write_file(destination / REJECTED_NAME, rejected_lines(rejected))
        _check_budget(plan, rejected, destination, config)
        index = _index(destination, plan, summaries, reasons(rejected))
        write_index(index)
        _remove_leftovers(destination, journal.names() - {summary.name for summary in summaries if summary.shard})
    return IngestReport(
        directory=destination,
        fingerprint=index.fingerprint,
        samples={split: index.num_samples(split) for split in index.splits},
        num_classes=index.num_classes,
        rejected=reasons(rejected),
        shards_written=num_written,
        shards_kept=len(summaries) - num_written,
        num_mask_classes=None if index.mask_classes is None else len(index.mask_classes),
        num_box_classes=None if index.box_classes is None else len(index.box_classes),
        tars=plan.tars,
    )


def _local(destination: str | Path) -> Path:
    """InputError for a URL, also one that has passed through a Path and lost a slash."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.]+:/", str(destination)) and is_url(
        re.sub(":/+", "://", str(destination), count=1)
    ):
        raise InputError(
            f"{destination}: a dataset is written to a local directory; name one, and copy it to a URL when it is "
            "finished: it is read there, too"
        )
    return Path(location(destination))


def _check_apart(source: str, destination: Path) -> None:
    source = source_name(source)
    if source == DIGITS or not os.path.isdir(source):
        return
    if destination.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(f"{destination}: lies in the source {source}, which would then hold its shards; name another")


def _run_jobs(
    plan: IngestPlan, destination: Path, journal: Journal, config: IngestConfig, progress: Progress
) -> tuple[list[ShardSummary], int]:
    """The summary of every shard, in the order of the plan, and how many shards were made now."""
    keys = {job.name: job.key() for job in plan.jobs}
    done = {job.name: kept for job in plan.jobs if (kept := journal.finished(job.name, keys[job.name]))}
    todo = [job for job in plan.jobs if job.name not in done]
    if todo:
        if plan.lay_out is not None:
            plan.lay_out()
        (destination / INDEX_NAME).unlink(missing_ok=True)  # the shards under an old index are about to change
        sync_directory(destination)
    num_files = len(plan.rejected) + sum(summary.files for summary in done.values())
    num_rejected = num_counted(plan.rejected) + sum(num_counted(summary.rejected) for summary in done.values())
    progress(num_files, plan.num_files)
    try:
        with closing(in_processes(partial(_run_job, destination), todo, num_workers(todo, config))) as summaries:
            for summary in summaries:
                journal.add(keys[summary.name], summary)
                done[summary.name] = summary
                num_files += summary.files
                num_rejected += num_counted(summary.rejected)
                progress(num_files, plan.num_files)
                if num_rejected / plan.num_images > config.max_rejected_fraction:
                    break  # it can only grow; `_check_budget` says so
    except BrokenProcessPool:
        raise IngestError(
            "a worker process was killed, perhaps for lack of memory; fewer workers need less: --set workers=1"
        ) from None
    return [done[job.name] for job in plan.jobs if job.name in done], len(todo)


def _run_job(destination: Path, job: ShardJob) -> ShardSummary:
    return job.run(destination)


def _check_budget(plan: IngestPlan, rejected: Sequence[Rejected], destination: Path, config: IngestConfig) -> None:
    fraction = num_counted(rejected) / plan.num_images
    why = ", ".join(f"{count} {reason}" for reason, count in reasons(rejected).items() if reason not in UNCOUNTED)
    if fraction > config.max_rejected_fraction:
        raise IngestError(
            f"{fraction:.2%} of the images were rejected ({why}), more than max_rejected_fraction "
            f"{config.max_rejected_fraction:g} allows; see {destination / REJECTED_NAME}; "
            "mend or remove them, or allow more"
        )
    if num_counted(rejected) == plan.num_images:
        raise IngestError(f"not one image could be taken ({why}); see {destination / REJECTED_NAME}")


def _index(
    destination: Path, plan: IngestPlan, summaries: Sequence[ShardSummary], rejected: dict[str, int]
) -> DatasetIndex:
    filled = [summary for summary in summaries if summary.shard]
    by_split = {split: [summary for summary in filled if summary.split == split] for split in SPLITS}
    splits = {split: tuple(summary.shard for summary in of_split) for split, of_split in by_split.items() if of_split}
    contents = {
        split: (sum(int(summary.content, 16) for summary in by_split[split]), sum(shard.samples for shard in shards))
        for split, shards in splits.items()
    }
    annotated = {
        "mask_classes": mask_class_names(plan.annotations, max(summary.mask_classes for summary in filled)),
        "box_classes": plan.annotations.box_classes,
    }
    totals = ImageTotals()
    for summary in by_split["train"] or filled:
        totals.merge(summary.totals)
    return DatasetIndex(
        directory=destination,
        fingerprint=dataset_fingerprint(contents, plan.classes, plan.label_sets, **annotated),
        splits=splits,
        classes=plan.classes,
        statistics=totals.divided(),
        provenance={"made_from": dict(plan.identity), "rejected": rejected, "pillow": PIL.__version__},
        **annotated,
        label_sets=plan.label_sets,
    )


def _remove_leftovers(destination: Path, names: set[str]) -> None:
    """Shards that an earlier state of the source had."""
    for name in names:
        (destination / name).unlink(missing_ok=True)
        (destination / table_name(name)).unlink(missing_ok=True)
