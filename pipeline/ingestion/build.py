"""Raw images -> dataset directory, whatever number of workers, however often it is killed on the way.

Every shard is made from its own fixed list of files by one job; the journal remembers finished ones; the index comes
last. So a re-run makes only the shards whose files changed or that are not there, and gives the same bytes.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import PIL

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.annotations import mask_class_names
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.certificate.certify import Evidence, certify
from pipeline.ingestion.duplicates.hash_file import FOLDER, hash_path
from pipeline.ingestion.duplicates.search import CopySearch, ExaminedDataset, read_others, search_copies
from pipeline.ingestion.isolation import Limits, TooManyFaults, WorkerLost, in_isolation, memory_limit
from pipeline.ingestion.journal import Journal, check_destination, open_journal
from pipeline.ingestion.plan import IngestPlan, identify, num_workers, plan_ingest
from pipeline.ingestion.rejected import UNCOUNTED, Rejected, num_counted, reasons, rejected_lines
from pipeline.ingestion.shard_jobs import ShardJob, ShardSummary
from pipeline.ingestion.sources.digits import DIGITS
from pipeline.ingestion.sources.opening import source_name
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.atomic import remove_temporaries, sync_directory, write_file
from pipeline.shards.fingerprint import dataset_fingerprint
from pipeline.shards.index import INDEX_NAME, SPLITS, DatasetIndex, table_name, write_index
from pipeline.storage.location import is_url, location

REJECTED_NAME = "rejected.jsonl"
FAULTS_BEYOND_BUDGET = 20

Progress = Callable[[int, int, int], None]  # (files done, files in all, images rejected)


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
    certificate: Path | None = None  # the page
    verdict: str = ""  # of the certificate, in a few words
    num_leaking: int = 0  # images with a copy where models are judged, that are still in the dataset


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
    others = read_others(config.leakage_against)
    check_destination(destination, plan.identity)
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{destination}: cannot be made ({error.strerror})") from None
    with open_journal(destination, plan.identity) as journal:
        work = _Work(plan, destination, journal, config, progress or (lambda done, total, rejected: None))
        index, summaries, search = work.examined(others)
        rejected = [*work.rejected(summaries), *(search.rejected() if search else ())]
        write_file(destination / REJECTED_NAME, rejected_lines(rejected))
        certificate = certify(index, config, Evidence(summaries, rejected, search))
        told = {"rejected": reasons(rejected), "certificate": certificate.sha256}
        write_index(replace(index, provenance={**index.provenance, **told}))
        _remove_leftovers(destination, journal.names() - {summary.name for summary in summaries if summary.shard})
    return IngestReport(
        directory=destination,
        fingerprint=index.fingerprint,
        samples={split: index.num_samples(split) for split in index.splits},
        num_classes=index.num_classes,
        rejected=reasons(rejected),
        shards_written=len(work.made),
        shards_kept=len(summaries) - len(work.made),
        num_mask_classes=None if index.mask_classes is None else len(index.mask_classes),
        num_box_classes=None if index.box_classes is None else len(index.box_classes),
        tars=plan.tars,
        certificate=certificate.page,
        verdict=certificate.verdict,
        num_leaking=search.findings.num_leaking if search else 0,
    )


@dataclass
class _Work:
    """One ingestion under way; `made` are the names of the shards that it made."""

    plan: IngestPlan
    destination: Path
    journal: Journal
    config: IngestConfig
    progress: Progress
    made: set[str] = field(default_factory=set)

    def examined(self, others: Sequence[DatasetIndex]) -> tuple[DatasetIndex, list[ShardSummary], CopySearch | None]:
        """Every shard made, and the search for copies, which left the dataset where they are removed."""
        remove = self.config.duplicates == "remove"
        summaries = self.summaries(self.plan.jobs, self.journal.examined if remove else self.journal.finished)
        rejected = self.rejected(summaries)
        try:
            _check_budget(self.plan, rejected, self.destination, self.config)
        except IngestError:
            write_file(self.destination / REJECTED_NAME, rejected_lines(rejected))
            raise
        index = _index(self.destination, self.plan, summaries)
        if self.config.examine == "header":
            return index, summaries, None
        search = search_copies(ExaminedDataset(index, self.plan.jobs, others), remove=remove)
        if not remove:
            return index, summaries, search
        left_out = search.left_out()
        jobs = [job.without(left_out.get(number, ())) for number, job in enumerate(self.plan.jobs)]
        summaries = self.summaries(jobs, self.journal.finished)
        index = _index(self.destination, self.plan, summaries)
        return index, summaries, replace(search, dataset=ExaminedDataset(index, self.plan.jobs, others))

    def rejected(self, summaries: Sequence[ShardSummary]) -> list[Rejected]:
        return [*self.plan.rejected, *(entry for summary in summaries for entry in summary.rejected)]

    def summaries(
        self, jobs: Sequence[ShardJob], known: Callable[[str, str], ShardSummary | None]
    ) -> list[ShardSummary]:
        """Of every shard, in the order of the plan; those that are not known are made."""
        made, names = _run_jobs(self.plan, jobs, known, self.destination, self.journal, self.config, self.progress)
        self.made |= names
        return made


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
    plan: IngestPlan, jobs: Sequence[ShardJob], known: Callable[[str, str], ShardSummary | None], destination: Path,
    journal: Journal, config: IngestConfig, progress: Progress,
) -> tuple[list[ShardSummary], set[str]]:  # fmt: skip
    """The summary of every shard, in the order of the jobs, and the names of those that were made now."""
    keys = {job.name: job.key() for job in jobs}
    done = {job.name: kept for job in jobs if (kept := known(job.name, keys[job.name]))}
    todo = [job for job in jobs if job.name not in done]
    if todo:
        if plan.lay_out is not None:
            plan.lay_out()
        (destination / INDEX_NAME).unlink(missing_ok=True)  # the shards under an old index are about to change
        sync_directory(destination)
    num_files = len(plan.rejected) + sum(summary.files for summary in done.values())
    num_rejected = num_counted(plan.rejected) + sum(num_counted(summary.rejected) for summary in done.values())
    progress(num_files, plan.num_files, num_rejected)
    try:
        with closing(_summaries(plan, destination, todo, config)) as summaries:
            for summary in summaries:
                journal.add(keys[summary.name], summary)
                done[summary.name] = summary
                num_files += summary.files
                num_rejected += num_counted(summary.rejected)
                progress(num_files, plan.num_files, num_rejected)
                if num_rejected / plan.num_images > config.max_rejected_fraction:
                    break  # it can only grow; `_check_budget` says so
    except WorkerLost as error:
        raise IngestError(f"{error}, perhaps for lack of memory; fewer workers need less: --set workers=1") from None
    except TooManyFaults as error:
        raise IngestError(
            f"images that end the process which decodes them ({error}) are more than max_rejected_fraction "
            f"{config.max_rejected_fraction:g} of {plan.num_images} allows; mend or remove them, or allow more"
        ) from None
    finally:
        remove_temporaries(destination)  # of workers that were ended
        remove_temporaries(destination / FOLDER)
    return [done[job.name] for job in jobs if job.name in done], {job.name for job in todo}


def _summaries(
    plan: IngestPlan, destination: Path, jobs: Sequence[ShardJob], config: IngestConfig
) -> Iterator[ShardSummary]:
    """In any order. The built-in digits are nobody's hostile files: they need no process of their own."""
    run = partial(_run_job, destination)
    if plan.identity["source"] == DIGITS:
        return (run(job) for job in jobs)
    # The usual way past the budget ends with a list of the rejected; this is for a decoder that fails on everything.
    allowed = int(config.max_rejected_fraction * plan.num_images) + FAULTS_BEYOND_BUDGET
    limits = Limits(config.max_image_seconds, memory_limit(config.max_pixels))
    return in_isolation(run, jobs, num_workers(jobs, config), limits, allowed)


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


def _index(destination: Path, plan: IngestPlan, summaries: Sequence[ShardSummary]) -> DatasetIndex:
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
        provenance={"made_from": dict(plan.identity), "pillow": PIL.__version__},
        **annotated,
        label_sets=plan.label_sets,
    )


def _remove_leftovers(destination: Path, names: set[str]) -> None:
    """Shards that an earlier state of the source had."""
    for name in names:
        (destination / name).unlink(missing_ok=True)
        (destination / table_name(name)).unlink(missing_ok=True)
        hash_path(destination, name).unlink(missing_ok=True)
