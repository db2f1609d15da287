"""Which images are copies of one another: equal pixels, by sorting; near copies, proposed by hash, then confirmed.

Near: perceptual hashes that differ in at most MOST_BITS of 64 bits, thumbnails that are as near as those of near copies
can be, and then the decoded pixels of both; the limits are those of `likeness`. Of images below SMALL pixels a side
only equal pixels are found, and an image of one colour is nobody's near copy.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from pipeline.errors import DataError
from pipeline.ingestion.duplicates.hamming import near_hash_pairs
from pipeline.ingestion.duplicates.joined import Joined
from pipeline.ingestion.duplicates.likeness import (
    MOST_BITS,
    SMALL,
    Likeness,
    are_near_copies,
    pixel_distance,
    root_mean_square,
    thumbnails_are_alike,
)
from pipeline.ingestion.duplicates.samples import OTHERS, ComparedSamples
from pipeline.shards.decoding import ImageFault

FLAT = 1.0  # grey levels of standard deviation of the thumbnail
MANY_EQUAL = 512  # images of one perceptual hash, of which each is compared with the first ones only
PROPOSALS_PER_IMAGE = 64  # and
PROPOSALS = 10_000_000  # of near hashes, beyond which no more are looked at
LOOKS_PER_IMAGE = 2  # and
LOOKS = 200_000  # at pairs of decoded images
SIFTED = 1024  # proposals at a time of which those that tell nothing new are dropped
REMEMBERED = 20_000  # small decoded images, 12 kB each

Read = Callable[[int], Likeness]  # by position; DataError or ImageFault where the image cannot be read


@dataclass(frozen=True)
class Copies:
    """`group` is (N,) int64: equal for positions of equal pixels, the position of the first of them. `near` is (P, 2)
    int64: firsts of two groups whose pixels are near, and `distance` (P,) in grey levels.

    `small` and `flat` count images that no near copy was looked for; `proposals_left` and `looks_left` what was beyond
    the limits, `unread` images that could not be read.
    """

    group: np.ndarray
    near: np.ndarray
    distance: np.ndarray
    small: int = 0
    flat: int = 0
    proposals: int = 0
    looks: int = 0
    cut_short: bool = False
    unread: int = 0


def find_copies(samples: ComparedSamples, read: Read) -> Copies:
    group = equal_pixels(samples.pixels)
    firsts = np.flatnonzero(group == np.arange(len(group)))
    small = samples.side[firsts] < SMALL
    flat = ~small & _is_flat(samples.thumbnail, firsts)
    search = _NearSearch(samples, group, read)
    for block in _proposed(samples, firsts[~small & ~flat], search):
        search.look_at(block)
    near = np.array(search.near, np.int64).reshape(-1, 2)
    order = np.lexsort((near[:, 1], near[:, 0]))
    own = samples.place < OTHERS
    return Copies(
        group, near[order], np.array(search.distances, np.float32)[order],
        small=int((own & (samples.side < SMALL)).sum()), flat=int((own[firsts] & flat).sum()),
        proposals=search.proposals, looks=search.looks, cut_short=search.cut_short, unread=len(search.unread),
    )  # fmt: skip


def equal_pixels(pixels: np.ndarray) -> np.ndarray:
    """(N,) int64: the first position of equal digests; zeros (not decoded) equal nobody's."""
    order = np.lexsort(pixels.T[::-1])  # stable: equal ones stay in the order of their positions
    ordered = pixels[order]
    new = np.ones(len(pixels), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1) | ~ordered[1:].any(axis=1)
    group = np.empty(len(pixels), np.int64)
    group[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return group


def places_of_groups(place: np.ndarray, group: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
    """(N,) uint64: at the first position of each group the bits of the places where it has an image (that is
    `present`), 0 elsewhere."""
    bits = np.uint64(1) << place.astype(np.uint64)
    places = np.zeros(len(place), np.uint64)
    np.bitwise_or.at(places, group, bits if present is None else np.where(present, bits, np.uint64(0)))
    return places


def _is_flat(thumbnails: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(P,) bool"""
    blocks = (positions[start : start + (1 << 16)] for start in range(0, len(positions), 1 << 16))
    return np.concatenate([np.zeros(0, bool), *(root_mean_square(thumbnails[block]) < FLAT for block in blocks)])


def _proposed(samples: ComparedSamples, positions: np.ndarray, search: "_NearSearch") -> Iterator[np.ndarray]:
    """Blocks (P, 2) of positions whose hashes and thumbnails are near."""
    by_hash = positions[np.argsort(samples.perceptual[positions], kind="stable")]
    hashes, starts, counts = np.unique(samples.perceptual[by_hash], return_index=True, return_counts=True)
    limit = PROPOSALS + PROPOSALS_PER_IMAGE * len(positions)
    distinct = (_between(block, by_hash, starts, counts, search) for block in near_hash_pairs(hashes, MOST_BITS))
    for block in chain(_equal_hash_pairs(by_hash, starts, counts, search), distinct):
        search.proposals += len(block)
        if search.proposals > limit or search.looks >= search.most_looks:
            search.cut_short = True
            return
        yield block[_alike(samples.thumbnail, block)]


def _equal_hash_pairs(
    by_hash: np.ndarray, starts: np.ndarray, counts: np.ndarray, search: "_NearSearch"
) -> Iterator[np.ndarray]:
    """All pairs of one hash; of very many, all pairs of the first ones, and of the first with each other."""
    for start, count in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        members = by_hash[start : start + count]
        one, other = np.triu_indices(min(count, MANY_EQUAL), 1)
        yield np.stack([members[one], members[other]], axis=1)
        if count > MANY_EQUAL:
            search.cut_short = True
            rest = members[MANY_EQUAL:]
            yield np.stack([np.full(len(rest), members[0]), rest], axis=1)


def _between(
    block: np.ndarray, by_hash: np.ndarray, starts: np.ndarray, counts: np.ndarray, search: "_NearSearch"
) -> np.ndarray:
    """Of pairs of distinct hashes: all pairs of positions that have them, of many only the first."""
    one, other = block.T
    sizes = np.minimum(counts[one], MANY_EQUAL), np.minimum(counts[other], MANY_EQUAL)
    products = sizes[0] * sizes[1]
    if (many := products > MANY_EQUAL).any():
        search.cut_short = True
        sizes, products = (np.where(many, 1, sizes[0]), np.where(many, 1, sizes[1])), np.where(many, 1, products)
    pair = np.repeat(np.arange(len(block)), products)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(products) - products, products)
    first = by_hash[starts[one[pair]] + within // sizes[1][pair]]
    second = by_hash[starts[other[pair]] + within % sizes[1][pair]]
    return np.sort(np.stack([first, second], axis=1), axis=1)


def _alike(thumbnails: np.ndarray, block: np.ndarray) -> np.ndarray:
    """(P,) bool"""
    alike = np.empty(len(block), bool)
    for start in range(0, len(block), 1 << 16):
        pairs = block[start : start + (1 << 16)]
        alike[start : start + len(pairs)] = thumbnails_are_alike(thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]])
    return alike


class _NearSearch:
    """What was confirmed so far. A pair that would tell nothing new is not decoded: two images of a split that are
    joined by others, or a leak of which both ends are known."""

    def __init__(self, samples: ComparedSamples, group: np.ndarray, read: Read):
        self._read = read
        self._samples = samples
        self._places = places_of_groups(samples.place, group)
        self._known = np.zeros(len(samples), np.uint64)  # bits of the places that a copy of a position is known in
        self._joined = [Joined(len(samples)) for _ in range(OTHERS)]  # inside each split
        self._shown: OrderedDict[int, Likeness | None] = OrderedDict()
        self.most_looks = LOOKS + LOOKS_PER_IMAGE * len(samples)
        self.near: list[tuple[int, int]] = []
        self.distances: list[float] = []
        self.proposals = self.looks = 0
        self.cut_short = False
        self.unread: set[int] = set()

    def look_at(self, block: np.ndarray) -> None:
        for start in range(0, len(block), SIFTED):
            pairs = block[start : start + SIFTED]
            for pair in pairs[self._tell_something(pairs)]:
                if self.looks >= self.most_looks:
                    self.cut_short = True
                    return
                if self._tell_something(pair[None])[0]:  # still, after those before it
                    self._compare(*pair.tolist())

    def _tell_something(self, pairs: np.ndarray) -> np.ndarray:
        """(P,) bool of (P, 2) positions."""
        one, other = pairs.T
        ours, theirs = self._places[one], self._places[other]
        unknown = (theirs & ~ours & ~self._known[one]) | (ours & ~theirs & ~self._known[other])
        telling = unknown != 0
        for place, joined in enumerate(self._joined):
            both = np.flatnonzero(ours & theirs & np.uint64(1 << place))
            telling[both] |= joined.are_apart(one[both], other[both])
        return telling & (((ours | theirs) & np.uint64((1 << OTHERS) - 1)) != 0)  # else both of other datasets

    def _compare(self, one: int, other: int) -> None:
        first, second = self._likeness(one), self._likeness(other)
        if first is None or second is None:
            return
        self.looks += 1
        if not are_near_copies(first, second):
            return
        self.near.append((min(one, other), max(one, other)))
        self.distances.append(pixel_distance(first.shown, second.shown))
        for place, joined in enumerate(self._joined):
            if int(self._places[one] & self._places[other]) >> place & 1:
                joined.join(one, other)
        self._known[one] |= self._places[other]
        self._known[other] |= self._places[one]

    def _likeness(self, position: int) -> Likeness | None:
        if position in self._shown:
            self._shown.move_to_end(position)
            return self._shown[position]
        try:
            likeness = self._read(position)
        except (DataError, ImageFault, OSError):
            likeness = None
            self.unread.add(position)
        self._shown[position] = likeness
        if len(self._shown) > REMEMBERED:
            self._shown.popitem(last=False)
        return likeness
