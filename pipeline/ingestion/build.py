"""Raw images -> dataset directory, whatever number of workers, however often it is killed on the way.

Every shard is made from its own fixed list of files by one job; the journal remembers finished ones; the index comes
last. So a re-run makes only the shards whose files changed or that are not there, and gives the same bytes.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.annotations import mask_class_names
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.certificate.certify import Evidence, certify
from pipeline.ingestion.duplicates.hash_file import hash_path
from pipeline.ingestion.duplicates.search import CopySearch, ExaminedDataset, read_others, search_copies
from pipeline.ingestion.journal import check_destination, open_journal
from pipeline.ingestion.machines.shard_groups import RunGroups
from pipeline.ingestion.making import REJECTED_NAME, IngestError, Progress, ShardMaker
from pipeline.ingestion.plan import IngestPlan, identify, plan_ingest
from pipeline.ingestion.rejected import Rejected, reasons, rejected_lines
from pipeline.ingestion.shard_jobs import ShardSummary
from pipeline.ingestion.sources.digits import DIGITS
from pipeline.ingestion.sources.opening import source_name
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.atomic import write_file
from pipeline.shards.fingerprint import dataset_fingerprint
from pipeline.shards.index import SPLITS, DatasetIndex, table_name, write_index
from pipeline.storage.location import is_url, location


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
    source: str, destination: str | Path, config: IngestConfig, progress: Progress | None = None,
    engine: RunGroups | None = None,
) -> IngestReport:  # fmt: skip
    """Make the dataset `destination` from `source`, or finish it; with an `engine`, on the machines that it has.

    InputError: wrong source, labels, splits or destination; nothing was written. IngestError: see there; what was
    finished stays, so a later run goes on from it. FaultError: a store behind a URL does not answer; run it again.
    """
    directory = _local(destination)
    _check_apart(source, directory)
    check_destination(directory, identify(source, config))
    with Scratch(directory) as scratch:
        return _ingest(source, directory, config, progress, scratch, engine)


def _ingest(
    source: str, destination: Path, config: IngestConfig, progress: Progress | None, scratch: Scratch,
    engine: RunGroups | None,
) -> IngestReport:  # fmt: skip
    plan = plan_ingest(source, config, scratch)
    others = read_others(config.leakage_against, destination)
    check_destination(destination, plan.identity)
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{destination}: cannot be made ({error.strerror})") from None
    with open_journal(destination, plan.identity) as journal:
        maker = ShardMaker(plan, destination, journal, config, progress or (lambda done, total, rejected: None), engine)
        index, summaries, search = _examined(maker, others)
        rejected = [*_rejected(plan, summaries), *(search.rejected() if search else ())]
        write_file(destination / REJECTED_NAME, rejected_lines(rejected))
        certificate = certify(index, config, Evidence(summaries, rejected, search, plan.layout))
        told = {"rejected": reasons(rejected), "certificate": certificate.sha256}
        write_index(replace(index, provenance={**index.provenance, **told}))
        _remove_leftovers(destination, journal.names() - {summary.name for summary in summaries if summary.shard})
    return IngestReport(
        directory=destination,
        fingerprint=index.fingerprint,
        samples={split: index.num_samples(split) for split in index.splits},
        num_classes=index.num_classes,
        rejected=reasons(rejected),
        shards_written=len(maker.made),
        shards_kept=len(summaries) - len(maker.made),
        num_mask_classes=None if index.mask_classes is None else len(index.mask_classes),
        num_box_classes=None if index.box_classes is None else len(index.box_classes),
        tars=plan.tars,
        certificate=certificate.page,
        verdict=certificate.verdict,
        num_leaking=search.findings.num_leaking if search else 0,
    )


def _examined(
    maker: ShardMaker, others: Sequence[DatasetIndex]
) -> tuple[DatasetIndex, list[ShardSummary], CopySearch | None]:
    """Every shard made, and the search for copies, which left the dataset where they are removed."""
    plan, destination, journal = maker.plan, maker.destination, maker.journal
    remove = maker.config.duplicates == "remove"
    summaries = maker.make(plan.jobs, journal.examined if remove else journal.finished)
    rejected = _rejected(plan, summaries)
    try:
        maker.check_budget(rejected)
    except IngestError:
        write_file(destination / REJECTED_NAME, rejected_lines(rejected))
        raise
    index = _index(destination, plan, summaries)
    if maker.config.examine == "header":
        return index, summaries, None
    search = search_copies(ExaminedDataset(index, plan.jobs, others), remove=remove)
    if not remove:
        return index, summaries, search
    left_out = search.left_out()
    jobs = [job.without(left_out.get(number, ())) for number, job in enumerate(plan.jobs)]
    summaries = maker.make(jobs, journal.finished)
    index = _index(destination, plan, summaries)
    return index, summaries, replace(search, dataset=ExaminedDataset(index, plan.jobs, others))


def _rejected(plan: IngestPlan, summaries: Sequence[ShardSummary]) -> list[Rejected]:
    return [*plan.rejected, *(entry for summary in summaries for entry in summary.rejected)]


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
