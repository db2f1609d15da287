"""What is good to know of a source before its dataset is trained on, as notes of the certificate: what was not read."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.ingestion.rejected import Rejected

LABEL_SUFFIXES = (".cls", ".json", ".txt")  # of WebDataset's members, YOLO's files and others
FAR_OFF = 2.0  # times its share, or less than its half


def unread_labels(rejected: Sequence[Rejected], paths: Sequence[str], tars: str | None) -> list[str]:
    """Files named like an image beside them, which often hold its label."""
    beside = [
        stem for entry in rejected
        if entry.reason == "not_an_image" and (stem := os.path.splitext(entry.path))[1].lower() in LABEL_SUFFIXES
    ]  # fmt: skip
    if not beside:
        return []
    images = {os.path.splitext(path)[0] for path in paths}
    counts = Counter(suffix for stem, suffix in beside if stem in images)
    if not counts:
        return []
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())
    hint = "tars=rewrite reads them as labels" if tars == "archive" else "labels=FILE names a file with all labels"
    return [f"files of the same names lie beside images and were not read ({kinds}); {hint}"]


def shares_of_splits(splits: Mapping[str, str], fractions: Mapping[str, float], groups: int) -> list[str]:
    """Of a split by hash: those that are empty, or far from their share, as few images or groups make them."""
    counts, total = Counter(splits.values()), len(splits)
    why = f"{groups:,} groups" if groups else f"{total:,} images"
    hint = f"a split by hash of {why} is coarse; another seed, or lists of your own (splits), make it otherwise"
    notes = []
    for split, fraction in fractions.items():
        share = counts[split] / total
        if fraction and not counts[split]:
            notes.append(f"no image is in split {split}, which was to have {fraction:.0%}: {hint}")
        elif not fraction / FAR_OFF <= share <= fraction * FAR_OFF:
            notes.append(f"{split} has {share:.1%} of the images, and was to have {fraction:.0%}: {hint}")
    return notes
