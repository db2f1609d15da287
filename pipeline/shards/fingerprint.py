"""The identity of a dataset: its images and labels per split, whatever their order, shards, machine or time.

Each sample is a 256-bit digest of its image and label; a shard's content is the sum of its digests modulo 2^256, so
sums of shards add up in any order. The fingerprint hashes the sum and count of each split with the class names, and
with the sets of classes that labels stand for, where they do.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

MODULUS = 1 << 256


def sample_digest(image_sha256: bytes, label: int) -> int:
    return int.from_bytes(hashlib.sha256(image_sha256 + label.to_bytes(4, "little", signed=True)).digest(), "little")


def content_sum(digests: Iterable[int]) -> int:
    return sum(digests) % MODULUS


def dataset_fingerprint(
    splits: Mapping[str, tuple[int, int]],
    classes: Sequence[str] | None,
    label_sets: Sequence[Sequence[int]] | None = None,
) -> str:
    """`splits` maps a name to (content sum, number of samples)."""
    content = {
        "splits": {split: [f"{total % MODULUS:064x}", samples] for split, (total, samples) in splits.items()},
        "classes": None if classes is None else list(classes),
    }
    if label_sets is not None:
        content["label_sets"] = [list(numbers) for numbers in label_sets]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
