"""Checksums of a checkpoint's files. Torch-free."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

CHECKSUM = "xxh3_128"  # what an entry calls it
DIGESTS = {CHECKSUM: xxhash.xxh3_128, "sha256": hashlib.sha256}


def checksum(parts: Sequence[bytes | memoryview]) -> str:
    """XXH3 of 128 bits: against accidents, at the speed of memory. SHA-256 would take longer than many a disk."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def is_intact(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file has the bytes that its entry in the manifest promises."""
    name = CHECKSUM if CHECKSUM in entry else "sha256"  # of checkpoints of old
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, DIGESTS[name]).hexdigest() == entry[name]
