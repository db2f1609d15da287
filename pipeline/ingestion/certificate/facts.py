"""What `certificate.json` says, in JSON's types. Lists of examples are cut at LISTED; counts never are."""

import platform
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion.certificate.copy_facts import LISTED, copy_facts
from pipeline.ingestion.certificate.verdict import verdict
from pipeline.ingestion.counts import ImageCounts
from pipeline.ingestion.duplicates.search import CopySearch
from pipeline.ingestion.labelling.layout import Layout
from pipeline.ingestion.rejected import UNCOUNTED, Rejected
from pipeline.ingestion.shard_contract import ShardSummary
from pipeline.shards.index import DatasetIndex
from pipeline.shards.reader import node_reader

FORMAT_VERSION = 1
EXAMPLES = 8  # of rejected files, per reason
Facts = dict[str, Any]

NO_LAYOUT = Layout()


def certificate_facts(
    index: DatasetIndex,
    config: IngestConfig,
    summaries: Sequence[ShardSummary],
    rejected: Sequence[Rejected],
    search: CopySearch | None,
    notes: Sequence[str] = (),
    layout: Layout = NO_LAYOUT,
) -> Facts:
    counts, uncounted = _image_counts(summaries)
    facts: Facts = {
        "format_version": FORMAT_VERSION,
        "verdict": {},
        "fingerprint": index.fingerprint,
        "splits": _split_facts(index),
        "classes": _class_facts(index),
        "layout": {"findings": list(layout.findings), "notes": list(layout.notes)},
        "images": {**_image_facts(counts), "sides": _sides(summaries)},
        "statistics": _statistics(index),
        "copies": None if search is None else copy_facts(search, index),
        "rejected": _rejected_facts(rejected),
        "not_examined": _not_examined(search, uncounted),
        "provenance": _provenance(index, config, search),
        "_notes": list(notes),
    }
    facts["verdict"] = verdict(facts)
    return facts


def _split_facts(index: DatasetIndex) -> Facts:
    return {
        split: {
            "images": index.num_samples(split),
            "unlabelled": index.num_unlabelled(split),
            "shards": len(shards),
            "bytes": sum(shard.bytes for shard in shards),
        }
        for split, shards in index.splits.items()
    }


def _class_facts(index: DatasetIndex) -> list[Facts] | None:
    """By class: its name, and its images in each split. None without classes."""
    if not index.classes:
        return None
    labels_of, classes_of = index.classes_of_labels()
    by_split = {}
    for split in index.splits:
        reader, of_labels = node_reader(index, split), np.zeros(index.num_labels, np.int64)
        for shard in range(len(reader.shard_sizes)):
            labels = reader.labels(shard)
            of_labels += np.bincount(labels[labels >= 0], minlength=index.num_labels)
        of_classes = np.zeros(index.num_classes, np.int64)
        np.add.at(of_classes, classes_of, of_labels[labels_of])
        by_split[split] = of_classes.tolist()
    return [
        {"name": name, **{split: counts[number] for split, counts in by_split.items()}}
        for number, name in enumerate(index.classes)
    ]


def _image_counts(summaries: Sequence[ShardSummary]) -> tuple[ImageCounts, int]:
    """Of all images, and of how many nothing was counted."""
    total, uncounted = ImageCounts(), 0
    for summary in summaries:
        if summary.shard is None:
            continue
        if summary.counts is None:
            uncounted += summary.shard.samples
        else:
            total.merge(summary.counts)
    return total, uncounted


def _image_facts(counts: ImageCounts) -> Facts:
    named = {key: _most_first(getattr(counts, key)) for key in ("formats", "modes", "changes", "profiles")}
    sized = {key: _histogram(getattr(counts, key)) for key in ("width", "height", "bytes")}
    return {"counted": counts.images, **named, **sized}


def _sides(summaries: Sequence[ShardSummary]) -> Facts:
    """Least and greatest width and height, in pixels, of all images."""
    totals = [summary.totals for summary in summaries if summary.totals.images]
    sides = {"width": [total.width for total in totals], "height": [total.height for total in totals]}
    return {
        side: [min(least for least, _, _ in values), max(most for _, _, most in values)]
        for side, values in sides.items()
        if values
    }


def _most_first(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _histogram(counts: dict[str, int]) -> list[Facts]:
    """Every step from the least to the greatest that occurs; `from` inclusive, `to` exclusive."""
    steps = {int(step): count for step, count in counts.items()}
    return [
        {"from": _ceiling(step), "to": _ceiling(step + 1), "count": steps.get(step, 0)}
        for step in (range(min(steps), max(steps) + 1) if steps else ())
        if _ceiling(step) < _ceiling(step + 1)
    ]


def _ceiling(step: int) -> int:
    """The least whole number that is in the step or beyond it."""
    return int(np.ceil(2 ** (step / 2) - 1e-6))


def _statistics(index: DatasetIndex) -> Facts | None:
    if index.statistics is None:
        return None
    named = index.statistics
    return {
        "of_split": "train" if "train" in index.splits else "all",
        "weighting": "image",  # a mean over images of the mean of each: all weigh the same, whatever their sizes
        "mean": named.mean and list(named.mean), "std": named.std and list(named.std),
        "mean_encoded_bytes": named.mean_encoded_bytes, "width": list(named.width), "height": list(named.height),
    }  # fmt: skip


def _rejected_facts(rejected: Sequence[Rejected]) -> Facts:
    """By reason, those that count as lost images first."""
    counts = Counter(entry.reason for entry in rejected)
    examples: dict[str, list[Facts]] = {reason: [] for reason in counts}
    for entry in sorted(rejected, key=lambda entry: (entry.path, entry.reason)):
        if len(examples[entry.reason]) < EXAMPLES:
            examples[entry.reason].append({"path": entry.path, "detail": entry.detail})
    order = sorted(counts, key=lambda reason: (reason in UNCOUNTED, -counts[reason], reason))
    return {
        reason: {"count": counts[reason], "lost_image": reason not in UNCOUNTED, "examples": examples[reason]}
        for reason in order
    }


def _not_examined(search: CopySearch | None, uncounted: int) -> list[str]:
    notes = []
    if uncounted:
        notes.append(f"formats, modes, changes and sizes of {uncounted:,} images, whose shards an earlier version made")
    if search is None:
        return [*notes, "pixels: the ingestion was told `examine: header`, so damage inside of images and copies of "
                "images were not looked for, and there are no pictures; `vit check --full` decodes all"]  # fmt: skip
    copies = search.copies
    if copies.small:
        notes.append(
            f"near copies of {copies.small:,} images with a side below 64 pixels: a perceptual hash says next to "
            "nothing of so few pixels; equal pixels were looked for"
        )
    if copies.flat:
        notes.append(f"near copies of {copies.flat:,} images of one colour, which are all alike")
    if copies.cut_short:
        notes.append("some pairs with near hashes: so many images are alike that the search was cut short")
    if copies.unread:
        notes.append(f"near copies of {copies.unread:,} images that could not be read again")
    if not search.dataset.others:
        notes.append("copies of evaluation images outside of this dataset: name theirs with leakage_against=[DATASET]")
    notes.append("crops, rotations and mirror images of other images: neither hash finds them")
    return notes


def _provenance(index: DatasetIndex, config: IngestConfig, search: CopySearch | None) -> Facts:
    made_from = dict(index.provenance.get("made_from", {}))
    others = [] if search is None else search.dataset.others
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {
        "source": made_from.get("source", ""),
        "config": config.model_dump(mode="json", exclude={"workers", "max_rejected_fraction"}),
        "max_rejected_fraction": config.max_rejected_fraction,
        "versions": {"python": f"{platform.python_implementation()} {python}", "pillow": PIL.__version__,
                     "numpy": np.__version__},
        "leakage_against": [
            {"dataset": str(other.directory), "fingerprint": other.fingerprint} for other in others
        ],
        "listed_at_most": LISTED,
    }  # fmt: skip
