"""Copies by the thousand: found, joined and given partners in time that grows with their number, not its square."""

import time

import numpy as np

from pipeline.ingestion.duplicates.copies import find_copies
from pipeline.ingestion.duplicates.findings import find_meaning
from pipeline.ingestion.duplicates.joined import Joined
from pipeline.ingestion.duplicates.likeness import HASHES, SIDE, Likeness
from pipeline.ingestion.duplicates.samples import OTHERS, ComparedSamples

PATTERN = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.float32)


def samples_of(place: np.ndarray, pixels: np.ndarray, perceptual: np.ndarray) -> ComparedSamples:
    """Images of 100 pixels a side with these digests and hashes, whose thumbnails are all alike."""
    count = len(place)
    thumbnail = np.tile(np.arange(64, dtype=np.uint8) * 3, (count, 1))
    digests = np.zeros((count, 4), np.uint64)
    digests[:, 0] = pixels + 1
    numbers = np.arange(count)
    return ComparedSamples(
        digests, perceptual.astype(np.uint64), thumbnail, np.full(count, 100), np.zeros(count, np.int32),
        place.astype(np.uint8), np.zeros(count, np.uint32), numbers, numbers,
    )  # fmt: skip


def alike(position: int) -> Likeness:
    hashes = np.zeros((), HASHES)
    hashes["side"] = 100
    return Likeness(hashes, PATTERN)


def test_thousands_of_equal_images_that_leak_have_the_first_judged_one_as_partner():
    count = 40_000
    place = np.sort(np.arange(count) % 2 * 2)  # train and test
    samples = samples_of(place, np.zeros(count), np.zeros(count))
    start = time.process_time()
    found = find_copies(samples, alike)
    findings = find_meaning(samples, found, np.ones(count, bool))
    assert time.process_time() - start < 5  # squared: two minutes
    assert findings.num_leaking == count // 2 and set(findings.partner[: count // 2]) == {count // 2}
    (leak,) = findings.leaks
    assert (leak.exact, leak.near, leak.touched) == (count // 2, 0, count // 2)


def test_thousands_of_near_copies_under_a_few_hashes_are_joined_without_looking_at_every_pair():
    count, num_hashes = 4_000, 8
    samples = samples_of(np.zeros(count), np.arange(count), np.arange(count) % num_hashes * 0x0101010101010101)
    start = time.process_time()
    found = find_copies(samples, alike)
    findings = find_meaning(samples, found, np.ones(count, bool))
    assert time.process_time() - start < 8
    assert found.proposals > 900_000 and found.looks < count  # each look joins
    assert findings.near_copies == {0: len(found.near)} and len(found.near) >= count - num_hashes


def test_of_near_copies_elsewhere_each_image_is_looked_at_until_its_leak_is_known():
    place = np.array([0, 0, 2, 2, OTHERS, OTHERS])
    found = find_copies(samples_of(place, np.arange(6), np.zeros(6)), alike)
    findings = find_meaning(samples_of(place, np.arange(6), np.zeros(6)), found, np.ones(6, bool))
    assert findings.leaking.tolist() == [True, True, False, False, False, False]
    assert {(leak.place, leak.to, leak.near, leak.touched) for leak in findings.leaks} == {
        (0, 2, 2, 2),
        (0, OTHERS, 2, 2),
    }
    assert [4, 5] not in found.near.tolist()  # both of another dataset


def test_sets_grow_together():
    random, joined, groups = np.random.default_rng(1), Joined(200), np.arange(200)
    for one, other in random.integers(0, 200, (150, 2)).tolist():
        assert joined.join(one, other) == (groups[one] != groups[other])
        groups[groups == groups[one]] = groups[other]
    ones, others = random.integers(0, 200, (2, 1000))
    assert (joined.are_apart(ones, others) == (groups[ones] != groups[others])).all()
