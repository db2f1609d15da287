"""What copies mean for a dataset: leaks, copies inside a split, contradictory labels; and which of them leave it.

An image leaks if a copy of it lies where models are judged: of an image of train in validation, test or a dataset of
`leakage_against`; of one of validation in test or such a dataset. Removed is the image that leaks, never the one that
it leaks to; inside a split all but the first of equal pixels and label. Equal pixels with different labels stay both:
which label is right is not ours to say.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.ingestion.duplicates.copies import Copies, places_of_groups
from pipeline.ingestion.duplicates.joined import Joined
from pipeline.ingestion.duplicates.samples import OTHERS, ComparedSamples
from pipeline.shards.index import SPLITS
from pipeline.shards.table import NO_LABEL

TRAIN, VALIDATION, TEST = range(len(SPLITS))


@dataclass(frozen=True)
class Leak:
    """Between two places: images of `place` with a copy in `to`, and images of `to` with one in `place`."""

    place: int
    to: int
    exact: int
    near: int  # without an exact copy
    touched: int


@dataclass(frozen=True)
class Findings:
    """`leaking` (N,) bool. `partner` (N,) int64: of an image that leaks or is a further copy, the one it is a copy of,
    else -1; `distance` (N,) in grey levels, 0 of equal pixels. Dictionaries are by split number."""

    leaks: tuple[Leak, ...]
    leaking: np.ndarray
    partner: np.ndarray
    distance: np.ndarray
    exact_copies: dict[int, int]  # images whose pixels were in the split before
    near_copies: dict[int, int]
    contradictions: np.ndarray  # (C, 2): firsts of each label of a group of equal pixels
    suspicions: np.ndarray  # (S, 3): near copies with different labels, and the row in `near`

    @property
    def num_leaking(self) -> int:
        return int(self.leaking.sum())


def find_meaning(samples: ComparedSamples, copies: Copies, present: np.ndarray) -> Findings:
    """Of the images that are `present`, (N,) bool."""
    exact_places = places_of_groups(samples.place, copies.group, present)
    near_places = np.zeros(len(samples), np.uint64)
    for one, other in (copies.near.T, copies.near.T[::-1]):
        np.bitwise_or.at(near_places, one, exact_places[other])
    exact, near = exact_places[copies.group], near_places[copies.group]
    higher = _higher(samples)[samples.place]
    leaking = present & (((exact | near) & higher) != 0)
    partner, distance = _partners(samples, copies, present, leaking)
    further = _further_copies(copies.group, samples.place, present)
    partner = np.where((partner < 0) & (further >= 0), further, partner)
    return Findings(
        leaks=tuple(_leaks(samples, present, exact, near)), leaking=leaking, partner=partner, distance=distance,
        exact_copies=_counts(samples.place[further >= 0]), near_copies=_near_copies(copies, exact_places),
        contradictions=_contradictions(samples, copies.group, present),
        suspicions=_suspicions(samples, copies, present),
    )  # fmt: skip


def leaving(samples: ComparedSamples, copies: Copies, findings: Findings) -> np.ndarray:
    """(N,) bool: the images that `duplicates: remove` leaves out, if all are present."""
    own = samples.place < OTHERS
    key = np.stack([copies.group, samples.place.astype(np.int64), samples.label.astype(np.int64)], axis=1)
    order = np.lexsort(key.T[::-1])
    again = np.zeros(len(samples), bool)
    again[order[1:]] = (key[order[1:]] == key[order[:-1]]).all(axis=1)
    return own & (findings.leaking | again)


def _higher(samples: ComparedSamples) -> np.ndarray:
    """By place: the bits of the places that an image of it leaks to."""
    places = int(samples.place.max(initial=TEST)) + 1
    others = sum(1 << place for place in range(OTHERS, places))
    higher = np.zeros(max(places, OTHERS), np.uint64)
    higher[TRAIN], higher[VALIDATION] = 1 << VALIDATION | 1 << TEST | others, 1 << TEST | others
    return higher


def _leaks(samples: ComparedSamples, present: np.ndarray, exact: np.ndarray, near: np.ndarray) -> Iterator[Leak]:
    for place in (TRAIN, VALIDATION):
        of_place = present & (samples.place == place)
        for to in range(place + 1, int(samples.place.max(initial=0)) + 1):
            there, here = np.uint64(1 << to), np.uint64(1 << place)
            equal, alike = of_place & ((exact & there) != 0), of_place & ((near & there) != 0)
            touched = present & (samples.place == to) & (((exact | near) & here) != 0)
            if equal.any() or alike.any():
                yield Leak(place, to, int(equal.sum()), int((alike & ~equal).sum()), int(touched.sum()))


def _partners(
    samples: ComparedSamples, copies: Copies, present: np.ndarray, leaking: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each image that leaks: the nearest of those it leaks to, and how far it is."""
    partner, distance = np.full(len(samples), -1, np.int64), np.zeros(len(samples), np.float32)
    if not leaking.any():
        return partner, distance
    near_to: dict[int, list[tuple[float, int]]] = {}
    for (one, other), apart in zip(copies.near.tolist(), copies.distance.tolist(), strict=True):
        near_to.setdefault(one, []).append((apart, other))
        near_to.setdefault(other, []).append((apart, one))
    neighbours = {group: [(0.0, group), *sorted(near)] for group, near in near_to.items()}
    firsts, higher = _firsts(samples.place, copies.group, present), _higher(samples).tolist()
    found: dict[tuple[int, int], tuple[int, float]] = {}  # by group and place: all of its images have the same
    for position in np.flatnonzero(leaking).tolist():
        group, place = int(copies.group[position]), int(samples.place[position])
        if (group, place) not in found:
            near = neighbours.get(group, [(0.0, group)])
            found[group, place] = next(
                (min(there), apart)
                for apart, other in near
                if (there := [first for at, first in firsts[other] if higher[place] >> at & 1])
            )
        partner[position], distance[position] = found[group, place]
    return partner, distance


def _firsts(place: np.ndarray, group: np.ndarray, present: np.ndarray) -> defaultdict[int, list[tuple[int, int]]]:
    """By group: each place where it has an image, and the first position there."""
    positions = np.flatnonzero(present)
    _, first = np.unique(group[positions] * 64 + place[positions], return_index=True)
    firsts: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for position in positions[first].tolist():
        firsts[int(group[position])].append((int(place[position]), position))
    return firsts


def _further_copies(group: np.ndarray, place: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(N,) int64: of an image whose pixels are in its split before, the first that has them; else -1."""
    positions = np.flatnonzero(present & (place < OTHERS))
    keys = group[positions] * OTHERS + place[positions]
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    further = np.full(len(group), -1, np.int64)
    firsts = positions[first[which]]
    further[positions] = np.where(firsts < positions, firsts, -1)
    return further


def _near_copies(copies: Copies, exact_places: np.ndarray) -> dict[int, int]:
    """By split: distinct images that are near an earlier one, by itself or over others."""
    counts = {}
    for place in range(OTHERS):
        there = (exact_places[copies.near] & np.uint64(1 << place)) != 0
        pairs = copies.near[there.all(axis=1)].tolist()
        joined = Joined(len(exact_places))
        if count := sum(joined.join(one, other) for one, other in pairs):
            counts[place] = count
    return counts


def _contradictions(samples: ComparedSamples, group: np.ndarray, present: np.ndarray) -> np.ndarray:
    own = np.flatnonzero(present & (samples.place < OTHERS) & (samples.label != NO_LABEL))
    own = own[np.lexsort((own, samples.label[own], group[own]))]
    labels, groups = samples.label[own], group[own]
    first = np.ones(len(own), bool)
    first[1:] = (labels[1:] != labels[:-1]) | (groups[1:] != groups[:-1])
    found = [pair for pair in pairwise(own[first].tolist()) if group[pair[0]] == group[pair[1]]]
    return np.array(found, np.int64).reshape(-1, 2)


def _suspicions(samples: ComparedSamples, copies: Copies, present: np.ndarray) -> np.ndarray:
    one, other = copies.near.T
    labelled = (samples.label[one] >= 0) & (samples.label[other] >= 0) & present[one] & present[other]
    rows = np.flatnonzero(labelled & (samples.label[one] != samples.label[other]))
    return np.column_stack([copies.near[rows], rows]).reshape(-1, 3)


def _counts(places: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(places, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
