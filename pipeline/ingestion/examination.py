"""All shards of a plan made and searched for copies; where copies leave, made again without them.

A file that changes or vanishes between the two would let what was found of the first stand for the second. So the
search is of the images that the last shards were made from, and shards are made until both agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL

from pipeline.ingestion.duplicates.search import CopySearch, ExaminedDataset, search_copies
from pipeline.ingestion.labelling.annotations import mask_class_names
from pipeline.ingestion.making import REJECTED_NAME, IngestError, ShardMaker
from pipeline.ingestion.plan import IngestPlan
from pipeline.ingestion.progress import counted
from pipeline.ingestion.rejected import Rejected, write_rejected
from pipeline.ingestion.shard_contract import ShardJob, ShardSummary
from pipeline.ingestion.statistics import ImageTotals
from pipeline.shards.fingerprint import dataset_fingerprint
from pipeline.shards.index import SPLITS, DatasetIndex

ROUNDS = 4  # of making without copies: one is enough where the source stays as it is


@dataclass(frozen=True)
class MadeDataset:
    """`index` is not written yet; `rejected` says of every file that is not in the dataset why. `search` is None where
    no pixels were examined."""

    index: DatasetIndex
    summaries: list[ShardSummary]
    rejected: list[Rejected]
    search: CopySearch | None


def make_dataset(maker: ShardMaker, others: Sequence[DatasetIndex]) -> MadeDataset:
    """IngestError where too few images, or none, are left, or the source changes again and again meanwhile."""
    plan, journal, remove = maker.plan, maker.journal, maker.config.duplicates == "remove"
    index, summaries = _make(maker, plan.jobs, journal.examined if remove else journal.finished)
    if maker.config.examine == "header":
        return MadeDataset(index, summaries, _rejected(plan, summaries), None)
    restored = counted(maker.progress, "restoring lost hashes")
    search = search_copies(ExaminedDataset(index, plan.jobs, others, restored), remove=remove)
    if remove:
        index, summaries, search = _without_copies(maker, others, search)
    return MadeDataset(index, summaries, [*_rejected(plan, summaries), *search.rejected()], search)


def _without_copies(
    maker: ShardMaker, others: Sequence[DatasetIndex], search: CopySearch
) -> tuple[DatasetIndex, list[ShardSummary], CopySearch]:
    """Made again until the copies that were left out are those among the images that were there."""
    plan = maker.plan
    for _ in range(ROUNDS):
        if search.leaves_nothing():
            entries = search.rejected()
            write_rejected(maker.destination, [*plan.rejected, *entries])
            raise IngestError(
                f"duplicates: remove: nothing is left: all {len(entries):,} images are copies, most of them of images "
                f"that models are judged by; see {maker.destination / REJECTED_NAME}; say report, or name other images"
            )
        left_out = search.left_out()
        jobs = [job.without(left_out.get(number, ())) for number, job in enumerate(plan.jobs)]
        index, summaries = _make(maker, jobs, maker.journal.finished)
        dataset = ExaminedDataset(index, plan.jobs, others)
        if dataset.has_images_of(search.dataset):
            return index, summaries, replace(search, dataset=dataset)
        search = search_copies(dataset, remove=True)
        if search.left_out() == left_out:
            return index, summaries, search
    raise IngestError(
        f"{plan.identity['source']}: its files change while they are read, so that copies cannot be told; run it again "
        "when nothing writes there"
    )


def _make(
    maker: ShardMaker, jobs: Sequence[ShardJob], known: Callable[[str, str], ShardSummary | None]
) -> tuple[DatasetIndex, list[ShardSummary]]:
    """Every shard, within the budget of rejected images."""
    summaries = maker.make(jobs, known)
    rejected = _rejected(maker.plan, summaries)
    try:
        maker.check_budget(rejected)
        if not any(summary.shard for summary in summaries):
            raise IngestError(f"nothing is left to make a dataset of; see {maker.destination / REJECTED_NAME}")
    except IngestError:
        write_rejected(maker.destination, rejected)
        raise
    if len(summaries) != len(jobs):
        raise AssertionError(f"{len(jobs) - len(summaries)} shards were not made, within the budget")
    return _index(maker.destination, maker.plan, summaries), summaries


def _rejected(plan: IngestPlan, summaries: Sequence[ShardSummary]) -> list[Rejected]:
    return [*plan.rejected, *(entry for summary in summaries for entry in summary.rejected)]


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
