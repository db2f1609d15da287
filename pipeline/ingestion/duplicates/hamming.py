"""All pairs of 64-bit hashes that differ in at most so many bits: every one, and without comparing all with all.

Manku, Jain, Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007, section 3: cut the 64 bits into b bands;
two hashes that differ in k bits differ in at most k bands, so in at least b - k bands they agree. For each choice of
b - k bands the hashes are sorted by these bands, and only neighbours that agree in them are compared. More bands mean
more sorts and fewer comparisons: 28 sorts by 16 bits or 84 by 21 for k = 6, chosen by the number of hashes. Hashes
that agree in a choice by the thousand are searched by the same way in the bits that are left.
"""

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import combinations
from math import comb, log2
from operator import or_

import numpy as np

SHORT_RUN = 48  # hashes that agree, up to which all such runs are compared at once, neighbour by neighbour
LONG_RUN = 2048  # from here on a run is searched by bands again
BLOCK = 1 << 20  # comparisons at a time: the memory of a search, beside 40 bytes a hash
SORT_COST = 4.0  # of one hash in one doubling, in comparisons


def near_hash_pairs(hashes: np.ndarray, most_bits: int) -> Iterator[np.ndarray]:
    """Blocks (P, 2) int64 of places i < j in (N,) uint64 `hashes` that differ in at most `most_bits` bits.

    Each pair comes once, in an order that depends on the hashes alone. They should be distinct: N equal hashes are
    N^2 / 2 pairs.
    """
    for block in _pairs(np.ascontiguousarray(hashes), list(range(64)), most_bits):
        yield np.sort(block, axis=1)


def num_bits(hashes: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are set."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(hashes)
    shape = hashes.shape
    bytes_of = np.ascontiguousarray(hashes).view(np.uint8).reshape(*shape, 8)
    return np.unpackbits(bytes_of, axis=-1).sum(axis=-1, dtype=np.uint8)


def choose_bands(num_hashes: int, num_free_bits: int, most_bits: int) -> tuple[int, int] | None:
    """(bands, how many of them agree) that cost least; None where comparing all with all costs less."""
    best, best_cost = None, num_hashes**2 / 2
    for agreeing in range(1, 5):
        bands = most_bits + agreeing
        bits = num_free_bits * agreeing // bands
        if bands > num_free_bits or not bits:
            continue
        sorting = SORT_COST * num_hashes * log2(max(2, num_hashes))
        cost = comb(bands, agreeing) * (sorting + num_hashes**2 / 2.0 ** (bits + 1))
        if cost < best_cost:
            best, best_cost = (bands, agreeing), cost
    return best


def _pairs(hashes: np.ndarray, free_bits: Sequence[int], most_bits: int) -> Iterator[np.ndarray]:
    """Pairs of `hashes`, which may differ in `free_bits` alone."""
    varying = int(np.bitwise_or.reduce(hashes ^ hashes[0])) if len(hashes) else 0
    free_bits = [bit for bit in free_bits if varying >> bit & 1]  # bands of bits that all share would tell none apart
    chosen = choose_bands(len(hashes), len(free_bits), most_bits)
    if chosen is None:
        yield from _all_pairs(hashes, most_bits)
        return
    num_bands, agreeing = chosen
    bands = [list(map(int, part)) for part in np.array_split(free_bits, num_bands)]
    masks = [np.uint64(reduce(or_, (1 << bit for bit in band))) for band in bands]
    for choice in combinations(range(num_bands), agreeing):
        # A pair that agrees in more bands comes with the first choice of those alone.
        earlier = [masks[band] for band in range(choice[-1]) if band not in choice]
        left = [bit for band in range(num_bands) if band not in choice for bit in bands[band]]
        for block in _agreeing_pairs(hashes, reduce(or_, (masks[band] for band in choice)), left, most_bits):
            differing = hashes[block[:, 0]] ^ hashes[block[:, 1]]
            first = np.ones(len(block), bool)
            for mask in earlier:
                first &= (differing & mask) != 0
            if first.any():
                yield block[first]


def _agreeing_pairs(hashes: np.ndarray, mask: np.uint64, left: Sequence[int], most_bits: int) -> Iterator[np.ndarray]:
    """Pairs that agree in the bits of `mask`."""
    order = np.argsort(hashes & mask, kind="stable")
    ordered = hashes[order]
    keys = ordered & mask
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    sizes = np.diff(np.append(starts, len(keys)))
    ends = np.repeat(starts + sizes, sizes)  # of the run of each
    yield from _neighbours(ordered, order, ends, np.repeat(sizes, sizes) <= SHORT_RUN, most_bits)
    for start, size in zip(starts[sizes > SHORT_RUN].tolist(), sizes[sizes > SHORT_RUN].tolist(), strict=True):
        run = ordered[start : start + size]
        found = _pairs(run, left, most_bits) if size > LONG_RUN else _all_pairs(run, most_bits)
        for block in found:
            yield order[start + block]


def _neighbours(
    ordered: np.ndarray, order: np.ndarray, ends: np.ndarray, short: np.ndarray, most_bits: int
) -> Iterator[np.ndarray]:
    """Each with the next, then with the one after that, and so on, while they are of one run."""
    active = np.flatnonzero(short)
    for distance in range(1, SHORT_RUN):
        active = active[active + distance < ends[active]]
        if not len(active):
            return
        near = active[num_bits(ordered[active] ^ ordered[active + distance]) <= most_bits]
        if len(near):
            yield np.stack([order[near], order[near + distance]], axis=1)


def _all_pairs(hashes: np.ndarray, most_bits: int) -> Iterator[np.ndarray]:
    rows = max(1, BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes) - 1, rows):
        ones, others = hashes[start : start + rows], hashes[start + 1 :]
        one, other = np.nonzero(num_bits(ones[:, None] ^ others[None, :]) <= most_bits)
        later = other >= one
        if later.any():
            yield np.stack([one[later] + start, other[later] + start + 1], axis=1)
