"""What the certificate says of copies: counts, and examples of each kind."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from pipeline.ingestion.duplicates.findings import Findings, Leak
from pipeline.ingestion.duplicates.likeness import MOST_BITS, MOST_DISTANCE, SMALL
from pipeline.ingestion.duplicates.samples import OTHERS
from pipeline.ingestion.duplicates.search import CopySearch
from pipeline.shards.index import SPLITS, DatasetIndex
from pipeline.shards.label_sets import names_of
from pipeline.shards.table import NO_LABEL

LISTED = 200  # examples of a kind
Facts = dict[str, Any]


def copy_facts(search: CopySearch, index: DatasetIndex) -> Facts:
    findings, dataset = search.findings, search.dataset
    examples = _Examples(search, index)
    leaking = np.flatnonzero(findings.leaking)
    leaking = leaking[np.argsort(findings.distance[leaking], kind="stable")].tolist()
    further = np.flatnonzero((findings.partner >= 0) & ~findings.leaking).tolist()
    removed = np.flatnonzero(search.removed).tolist()
    suspicions = [(one, other, float(search.copies.distance[row])) for one, other, row in findings.suspicions.tolist()]
    return {
        "method": {
            "exact": "SHA-256 of the upright decoded pixels and their shape",
            "near": f"pHash (64 bits, DCT of 32 x 32 grey pixels) within {MOST_BITS} bits, confirmed by a root mean "
            f"square difference of at most {MOST_DISTANCE:g} grey levels at 32 x 32, mean brightness made equal",
            "smallest_side": SMALL, "bits": MOST_BITS, "grey_levels": MOST_DISTANCE,
        },
        "policy": "remove" if search.remove else "report",
        "compared_images": len(dataset.samples),
        "too_small_for_near": search.copies.small,
        "leaks": [_leak(leak, search) for leak in findings.leaks],
        "leaking_images": findings.num_leaking,
        "exact_copies": {SPLITS[place]: count for place, count in findings.exact_copies.items()},
        "near_copies": {SPLITS[place]: count for place, count in findings.near_copies.items()},
        "contradictory_labels": _contradictions(search),
        "suspicious_labels": len(findings.suspicions),
        "removed": {
            "images": len(removed),
            "leaking": int((search.whole.leaking & search.removed).sum()),
            "examples": examples.pairs(_with_partners(search.whole, removed)),
        },
        "examples": {
            "leaks": examples.pairs(_with_partners(findings, leaking)),
            "contradictory_labels": examples.pairs((*pair, 0.0) for pair in findings.contradictions.tolist()),
            "suspicious_labels": examples.pairs(sorted(suspicions, key=lambda pair: pair[2])),
            "exact_copies": examples.pairs(_with_partners(findings, further)),
            "near_copies": examples.pairs(sorted(_near_inside_splits(search), key=lambda pair: pair[2])),
        },
    }  # fmt: skip


def _near_inside_splits(search: CopySearch) -> list[tuple[int, int, float]]:
    """(position, position, distance) of near copies in one split, both of which are in the dataset."""
    dataset, copies = search.dataset, search.copies
    present_near = [
        (one, other, apart) for (one, other), apart in zip(copies.near.tolist(), copies.distance.tolist(), strict=True)
        if not search.removed[[one, other]].any()
    ]  # fmt: skip
    own_near = [pair for pair in present_near if dataset.samples.place[list(pair[:2])].max() < OTHERS]
    return [pair for pair in own_near if dataset.samples.place[pair[0]] == dataset.samples.place[pair[1]]]


def _contradictions(search: CopySearch) -> Facts:
    """Images with a label whose pixels are also there under another one, and the groups of equal pixels they are in."""
    samples, group = search.dataset.samples, search.copies.group
    first = search.findings.contradictions[:, 0]
    labelled = ~search.removed & (samples.place < OTHERS) & (samples.label != NO_LABEL)
    groups = np.unique(group[first])
    return {"images": int((labelled & np.isin(group, groups)).sum()), "groups": len(groups)}


def _with_partners(findings: Findings, positions: Iterable[int]) -> Iterable[tuple[int, int, float]]:
    return ((at, int(findings.partner[at]), float(findings.distance[at])) for at in positions)


def _leak(leak: Leak, search: CopySearch) -> Facts:
    to = leak.to
    samples = search.dataset.samples
    return {
        "from": SPLITS[leak.place],
        "to": SPLITS[to] if to < OTHERS else search.dataset.other_name(to),
        "images": leak.exact + leak.near,
        "exact": leak.exact,
        "near": leak.near,
        "images_there": leak.touched,
        "of_images_there": int(((samples.place == to) & ~search.removed).sum()),
    }


class _Examples:
    def __init__(self, search: CopySearch, index: DatasetIndex):
        self._search, self._index = search, index

    def pairs(self, pairs: Iterable[tuple[int, int, float]]) -> list[Facts]:
        """Of (position, position, distance)."""
        return [
            {"grey_levels": round(float(apart), 2), "images": [self._image(one), self._image(other)]}
            for one, other, apart in islice(pairs, LISTED)
        ]

    def _image(self, position: int) -> Facts:
        dataset = self._search.dataset
        samples = dataset.samples
        said: Facts = {"_position": position, "split": dataset.place_name(position), "key": dataset.key(position)}
        if samples.place[position] < OTHERS:
            said["source"] = dataset.path(position)
            label = int(samples.label[position])
            if label >= 0 and self._index.classes:
                said["class"] = self._class(label)
        elif record := dataset.record(position):
            named = {"source": record.get("source"), "class": record.get("class")}
            if isinstance(record.get("classes"), list):
                named["class"] = ", ".join(map(str, record["classes"])) or "none"
            said |= {key: str(value) for key, value in named.items() if value is not None}
        return said

    def _class(self, label: int) -> str:
        if self._index.label_sets is None:
            return self._index.classes[label]
        return ", ".join(names_of(label, self._index.label_sets, self._index.classes)) or "none"
