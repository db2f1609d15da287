"""The identity of a dataset: its images, labels, masks and boxes per split, whatever their order, shards or time.

Each sample is a 256-bit digest of its image, label and annotations; a shard's content is the sum of its digests modulo
2^256, so sums of shards add up in any order. The fingerprint hashes the sum and count of each split with the class
names. What has no masks or boxes has the fingerprint that it had before there were any.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

MODULUS = 1 << 256


def sample_digest(image_sha256: bytes, label: int, annotations: bytes = b"") -> int:
    """`annotations`: as `annotation_bytes` gives them."""
    content = image_sha256 + label.to_bytes(4, "little", signed=True) + annotations
    return int.from_bytes(hashlib.sha256(content).digest(), "little")


def content_sum(digests: Iterable[int]) -> int:
    return sum(digests) % MODULUS


def dataset_fingerprint(
    splits: Mapping[str, tuple[int, int]],
    classes: Sequence[str] | None,
    label_sets: Sequence[Sequence[int]] | None = None,
    **annotated: Sequence[str] | None,
) -> str:
    """`splits` maps a name to (content sum, number of samples); `annotated` are `mask_classes` and `box_classes`."""
    content = {
        **{key: list(names) for key, names in annotated.items() if names is not None},
        "splits": {split: [f"{total % MODULUS:064x}", samples] for split, (total, samples) in splits.items()},
        "classes": None if classes is None else list(classes),
    }
    if label_sets is not None:
        content["label_sets"] = [list(numbers) for numbers in label_sets]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
