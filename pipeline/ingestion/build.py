"""Raw images -> dataset directory, whatever number of workers, however often it is killed on the way.

Every shard is made from its own fixed list of files by one job; the journal remembers finished ones; the index comes
last. So a re-run makes only the shards whose files changed or that are not there, and gives the same bytes.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.archives.unpacking import Scratch
from pipeline.ingestion.certificate.certify import Evidence, certify
from pipeline.ingestion.duplicates.hash_file import hash_path
from pipeline.ingestion.duplicates.search import read_others
from pipeline.ingestion.examination import make_dataset
from pipeline.ingestion.journal import check_destination, open_journal
from pipeline.ingestion.machines.shard_groups import RunGroups
from pipeline.ingestion.making import ShardMaker
from pipeline.ingestion.opening import source_name
from pipeline.ingestion.plan import identify, plan_ingest
from pipeline.ingestion.progress import Progress, untold
from pipeline.ingestion.rejected import reasons, write_rejected
from pipeline.ingestion.sources.digits import DIGITS
from pipeline.shards.certificate import REJECTED_SHA256
from pipeline.shards.index import table_name, write_index
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
    findings: tuple[str, ...] = ()  # of the verdict
    num_unlabelled: int = 0
    num_leaking: int = 0  # images with a copy where models are judged, that are still in the dataset


def ingest(
    source: str, destination: str | Path, config: IngestConfig, progress: Progress = untold,
    engine: RunGroups | None = None,
) -> IngestReport:  # fmt: skip
    """Make the dataset `destination` from `source`, or finish it; with an `engine`, on the machines that it has.

    InputError: wrong source, labels, splits or destination; nothing was written. IngestError: see there; what was
    finished stays, so a later run goes on from it. FaultError: a store behind a URL does not answer; run it again.
    IngestStopped where Ctrl-C comes while shards are made.
    """
    identity = identify(source, config)  # first, for no message may show a URL that carries a secret
    directory = _local(destination)
    _check_apart(source, directory)
    check_destination(directory, identity)
    with Scratch(directory) as scratch:
        return _ingest(source, directory, config, progress, scratch, engine)


def _ingest(
    source: str, destination: Path, config: IngestConfig, progress: Progress, scratch: Scratch,
    engine: RunGroups | None,
) -> IngestReport:  # fmt: skip
    plan = plan_ingest(source, config, scratch, progress)
    others = read_others(config.leakage_against, destination)
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{destination}: cannot be made ({error.strerror})") from None
    with open_journal(destination, plan.identity) as journal:
        maker = ShardMaker(plan, destination, journal, config, progress, engine)
        with maker.telling_what_stays():
            dataset = make_dataset(maker, others)
            index, summaries, rejected, search = dataset.index, dataset.summaries, dataset.rejected, dataset.search
            sha256 = write_rejected(destination, rejected)
            certificate = certify(index, config, Evidence(summaries, rejected, search, plan.notes, plan.layout))
            told = {"rejected": reasons(rejected), REJECTED_SHA256: sha256, "certificate": certificate.sha256}
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
        findings=certificate.findings,
        num_unlabelled=sum(map(index.num_unlabelled, index.splits)) if index.classes else 0,
        num_leaking=search.findings.num_leaking if search else 0,
    )


def _local(destination: str | Path) -> Path:
    """InputError for a URL, also one that has passed through a Path and lost a slash."""
    url = re.sub("^([A-Za-z][A-Za-z0-9+.]+):/+", r"\1://", str(destination))
    if is_url(url):
        location(url)  # which refuses a password
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


def _remove_leftovers(destination: Path, names: set[str]) -> None:
    """Shards that an earlier state of the source had."""
    for name in names:
        (destination / name).unlink(missing_ok=True)
        (destination / table_name(name)).unlink(missing_ok=True)
        hash_path(destination, name).unlink(missing_ok=True)
