"""Every pair of hashes that differ in few bits is found once, as comparing all with all finds it."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pipeline.ingestion.duplicates.hamming import choose_bands, near_hash_pairs, num_bits
from pipeline.ingestion.duplicates.likeness import MOST_BITS, are_near_copies, likeness
from tests.pipeline.pictures import encoded


def compared_with_all(hashes: np.ndarray, most_bits: int) -> set[tuple[int, int]]:
    pairs = set()
    for one in range(len(hashes)):
        near = np.flatnonzero(num_bits(hashes[one + 1 :] ^ hashes[one]) <= most_bits)
        pairs |= {(one, one + 1 + int(other)) for other in near}
    return pairs


def found(hashes: np.ndarray, most_bits: int) -> set[tuple[int, int]]:
    pairs = [tuple(pair) for block in near_hash_pairs(hashes, most_bits) for pair in block.tolist()]
    assert len(pairs) == len(set(pairs))
    return set(pairs)


def with_near_ones(hashes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Distinct and shuffled, a quarter of them made from others by turning up to eight bits."""
    hashes = hashes.copy()
    for place in random.choice(len(hashes), len(hashes) // 4, replace=False):
        turned = random.choice(64, int(random.integers(0, 9)), replace=False)
        hashes[place] = hashes[random.integers(len(hashes))] ^ np.uint64(sum(1 << int(bit) for bit in turned))
    return random.permutation(np.unique(hashes))


@pytest.mark.parametrize("kind", ["random", "one half equal", "few bits vary", "a run of thousands"])
def test_all_near_pairs_are_found_and_each_once(kind):
    random = np.random.default_rng(7)
    hashes = random.integers(0, 1 << 64, 5000, dtype=np.uint64)
    if kind == "one half equal":
        hashes = hashes << np.uint64(32)
    elif kind == "few bits vary":
        hashes = random.integers(0, 1 << 13, 5000, dtype=np.uint64) << np.uint64(30)
    elif kind == "a run of thousands":
        hashes[:3500] &= np.uint64((1 << 45) - 1)
    hashes = with_near_ones(hashes, random)
    most_bits = 2 if kind == "few bits vary" else 6
    pairs = compared_with_all(hashes, most_bits)
    assert len(pairs) > 300 and found(hashes, most_bits) == pairs


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_hashes_are_compared_too(count):
    hashes = np.array([5, 7], np.uint64)[:count]
    assert found(hashes, 6) == ({(0, 1)} if count == 2 else set())


def test_many_hashes_are_not_compared_with_one_another():
    assert choose_bands(100, 64, 6) is None
    assert choose_bands(1_000_000, 64, 6) == (8, 2)
    hashes = np.unique(np.random.default_rng(0).integers(0, 1 << 64, 100_000, dtype=np.uint64))
    assert sum(map(len, near_hash_pairs(hashes, 6))) < 10  # 5 billion comparisons would take minutes


CHANGES = {  # of a photo, and the least share of 240 copies that are to be found
    "JPEG 30": (lambda photo: encoded(photo, "JPEG", quality=30), 1.0),
    "half the size": (lambda photo: encoded(photo.resize((photo.width // 2, photo.height // 2)), "PNG"), 0.97),
    "256 x 256": (lambda photo: encoded(photo.resize((256, 256)), "JPEG", quality=80), 0.97),
    "brighter": (lambda photo: encoded(ImageEnhance.Brightness(photo).enhance(1.05), "PNG"), 0.97),
}


@pytest.mark.data
@pytest.mark.skipif("VIT_TEST_DATA" not in os.environ, reason="needs VIT_TEST_DATA")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_of_photos_are_within_the_bits_and_the_pixels_confirm_them(change):
    changed, least = CHANGES[change]
    with zipfile.ZipFile(Path(os.environ["VIT_TEST_DATA"]) / "caltech101/caltech101_99.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[::33][:240]
        contents = [archive.read(name) for name in names]
    found = 0
    for content in contents:
        photo, copy = likeness(content), likeness(changed(Image.open(io.BytesIO(content)).convert("RGB")))
        bits = int(num_bits(photo.hashes["perceptual"] ^ copy.hashes["perceptual"]))
        found += bits <= MOST_BITS and are_near_copies(photo, copy)
    assert found / len(contents) >= least
